"""The fine-tuning strategies of Lawton et al. 2025 (arXiv 2510.01600), section 2, and RA-DIT's.

| strategy | trains | objective | needs gold passages |
|---|---|---|---|
| none | nothing | | no |
| retriever | query encoder | multiple-negatives ranking | yes |
| generator | adapters | answer NLL over the base retriever's passages, in one prompt | no |
| ralt | adapters | answer NLL over the same passages, in a prompt each: RA-DIT (2310.01352) | no |
| lsr | query encoder | KL to the base generator's likelihoods given each passage: RA-DIT | no |
| ra_dit | nothing more | combines ralt and lsr | no |
| independent | nothing more | combines retriever and generator | yes |
| two_phase | adapters, then query encoder | RAG-Token, the other part frozen | no |
| joint_token | both at once | RAG-Token | no |
| joint_sequence | both at once | RAG-Sequence | no |

A `Strategy` holds its style in figures, its requirements, its learning rates and its tasks.
"""

from fedrag_jax.data.examples import Dataset
from fedrag_jax.rag import RAGSystem
from fedrag_jax.strategies.objectives import OBJECTIVES, marginal_task
from fedrag_jax.strategies.strategy import Tasks, strategy

# Of the marginal likelihoods, in two phases or at once.
MARGINAL_RATES = {"adapters": "marginal_generator", "query": "marginal_retriever"}


@strategy("none", "#000000", "o", rates={})
def none(system: RAGSystem, dataset: Dataset) -> Tasks:
    """Returns the system unchanged."""
    yield from ()  # it asks for nothing, and is a generator like the others
    return system


@strategy("retriever", "#56B4E9", "v", needs_gold=True, rates={"query": "retriever"})
def retriever(system: RAGSystem, dataset: Dataset) -> Tasks:
    """Query-side tuning on gold passages."""
    return system.replace(**(yield OBJECTIVES["in_batch"].task(system, dataset)))


@strategy("generator", "#E69F00", "s", rates={"adapters": "generator"})
def generator(system: RAGSystem, dataset: Dataset) -> Tasks:
    """Tunes adapters on the passages of the base retriever."""
    return system.replace(**(yield OBJECTIVES["concatenated"].task(system, dataset)))


@strategy("RALT", "#E69F00", "s", rates={"adapters": "ralt"})
def ralt(system: RAGSystem, dataset: Dataset) -> Tasks:
    """Tunes adapters on the passages of the base retriever, one prompt per passage."""
    return system.replace(**(yield OBJECTIVES["ralt"].task(system, dataset)))


@strategy("LSR", "#56B4E9", "v", rates={"query": "lsr"})
def lsr(system: RAGSystem, dataset: Dataset) -> Tasks:
    """Tunes the query encoder by the base generator's likelihoods given each passage."""
    return system.replace(**(yield OBJECTIVES["lsr"].task(system, dataset)))


@strategy("RA-DIT", "#009E73", "^", rates={"adapters": "ralt", "query": "lsr"})
def ra_dit(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RA-DIT: combines `ralt` and `lsr`, each trained with the other part untuned."""
    read = yield from ralt.tasks(system, dataset)
    found = yield from lsr.tasks(system, dataset)
    return read.replace(query=found.retriever.query)


@strategy("independent", "#009E73", "^", needs_gold=True)
def independent(system: RAGSystem, dataset: Dataset) -> Tasks:
    """Combines the tuned retriever and the tuned generator, which are trained separately."""
    found = yield from retriever.tasks(system, dataset)
    read = yield from generator.tasks(system, dataset)
    return read.replace(query=found.retriever.query)


@strategy("two-phase", "#D55E00", "D", rates=MARGINAL_RATES)
def two_phase(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Token twice: the adapters first, then the query encoder under the tuned generator."""
    system = yield from first_phase.tasks(system, dataset)
    return (yield from second_phase.tasks(system, dataset))


@strategy(rates=MARGINAL_RATES)
def first_phase(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Token on the adapters, the retriever frozen."""
    return system.replace(**(yield marginal_task(system, dataset, ("adapters",), "token")))


@strategy(rates=MARGINAL_RATES)
def second_phase(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Token on the query encoder, the generator frozen."""
    return system.replace(**(yield marginal_task(system, dataset, ("query",), "token")))


@strategy("joint, RAG-Token", "#0072B2", "P", rates=MARGINAL_RATES)
def joint_token(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Token on both parts at once."""
    return system.replace(**(yield OBJECTIVES["rag_token"].task(system, dataset)))


@strategy("joint, RAG-Sequence", "#CC79A7", "X", rates=MARGINAL_RATES)
def joint_sequence(system: RAGSystem, dataset: Dataset) -> Tasks:
    """RAG-Sequence on both parts at once."""
    return system.replace(**(yield OBJECTIVES["rag_sequence"].task(system, dataset)))


# Those that tune RA-DIT's parts look like the others that tune these parts. Phases are in no table.
STRATEGIES = {
    row.name: row
    for row in (
        none, retriever, generator, ralt, lsr, ra_dit, independent, two_phase, joint_token,
        joint_sequence,
    )
}  # fmt: skip
