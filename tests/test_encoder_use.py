"""Encoders are used as they want to be, in search and training: prompts and similarity."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from golden_encoders import GOLDEN, PASSAGES, QUESTIONS, WORDS, folder, plain

from configs import compare_strategies
from experiments.loading import load_retriever
from fedrag_jax.cli import index
from fedrag_jax.cli.command_line import main
from fedrag_jax.data.examples import Dataset, Example, Passage
from fedrag_jax.data.padding import encoder_table
from fedrag_jax.errors import ConfigError
from fedrag_jax.evaluation.benchmarks.identity import identity
from fedrag_jax.models import hub, sentence_folders
from fedrag_jax.models.pooling import SIMILARITIES
from fedrag_jax.objectives.encoding import Questions, passage_scores, trained_parts
from fedrag_jax.objectives.retriever import multiple_negatives_ranking
from fedrag_jax.rag import RAGSystem
from fedrag_jax.retrieval.index.device_index import DeviceIndex
from fedrag_jax.retrieval.index.silos import SearchBudget, over_silos
from fedrag_jax.retrieval.retriever import Retriever
from fedrag_jax.retrieval.stores.device_store import DeviceStore
from fedrag_jax.retrieval.stores.faiss_store import FaissStore
from fedrag_jax.retrieval.stores.qdrant import QdrantStore

pytestmark = pytest.mark.usefixtures("strict_types")

EXAMPLES = [
    Example(f"e{i}", q, ("w1",), (f"p{3 * i}", f"p{3 * i + 1}")) for i, q in enumerate(QUESTIONS)
]
PROMPTS = {"query_prompt": "w3 w4 ", "document_prompt": "w5 "}


def similarities(kind, q, d):
    q, d = np.asarray(q, np.float64), np.asarray(d, np.float64)
    if kind == "euclidean":
        return -((q[:, None] - d[None]) ** 2).sum(-1)
    if kind == "cosine":
        q, d = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, d))
    return q @ d.T


def expected(kind, prompts=("", "")):
    query, document = prompts
    d = plain([document + p.text for p in PASSAGES])
    return similarities(kind, plain([query + q for q in QUESTIONS]), d)


# --- prompts ---------------------------------------------------------------------------------------


def test_vectors_are_of_the_prompt_and_the_text(tmp_path):
    told = {"prompts": {"query": "w3 w4 ", "document": "w5 "}, "similarity_fn_name": "dot"}
    retriever = Retriever.build(hub.load(folder(tmp_path, **told)), PASSAGES)
    d = plain(["w5 " + p.text for p in PASSAGES])
    for vectors in (
        retriever.vectors,
        retriever.refresh(retriever.document).vectors,
        retriever.embed_new(PASSAGES),
        retriever.embed_kept(PASSAGES),
    ):
        np.testing.assert_allclose(vectors, d, atol=1e-5)
    q = plain(["w3 w4 " + q for q in QUESTIONS])
    np.testing.assert_allclose(retriever.embed_questions(QUESTIONS), q, atol=1e-5)
    assert np.abs(d - plain([p.text for p in PASSAGES])).max() > 0.1
    # Titles come after the prompt, as the text of a passage begins with them.
    (titled,) = retriever.embed_new([Passage("t", "w7", "w8")])
    np.testing.assert_allclose(titled, plain(["w5 w7 w8"])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("told", "query", "document"),
    [
        ({"query": "q: ", "document": "d: "}, "q: ", "d: "),
        ({"query": "q: ", "passage": "p: "}, "q: ", "p: "),
        ({"corpus": "c: ", "query": None}, "", "c: "),
        ({"all": "a: "}, "a: ", "a: "),
        ({"all": "a: ", "query": "", "document": "d: "}, "", "d: "),
        ({}, "", ""),
    ],
)
def test_prompts_are_chosen_as_sentence_transformers_does(tmp_path, told, query, document):
    usual = "all" if "all" in told else None
    config = hub.load(folder(tmp_path, prompts=told, default_prompt_name=usual)).network.config
    assert (config.query_prompt, config.document_prompt) == (query, document)


def test_a_prompt_counts_among_the_tokens_that_are_read(tmp_path):
    long = " ".join(WORDS)
    retriever = Retriever.build(hub.load(GOLDEN / "bert_cls"), [], **PROMPTS, similarity="dot")
    cut = retriever.embed_new([Passage("l", "", long)])[0]
    np.testing.assert_allclose(cut, plain(["w5 " + long])[0], atol=1e-5)
    length = retriever.encoder.config.max_length
    assert retriever.passage_room == length - 3  # [CLS], [SEP] and one of the prompt
    kept = " ".join(WORDS[: retriever.passage_room])
    np.testing.assert_allclose(cut, retriever.embed_new([Passage("k", "", kept)])[0], atol=1e-5)
    with pytest.raises(
        ConfigError, match=f"reads {length} tokens, and its prompt 'w1 w1.*no.*text"
    ):
        Retriever.build(hub.load(GOLDEN / "bert_cls"), [], query_prompt="w1 " * length)


def test_training_reads_what_search_reads():
    model = hub.load(GOLDEN / "bert_cls")
    retriever = Retriever.build(model, PASSAGES, **PROMPTS)
    _, frozen = trained_parts(retriever, ("query", "document"))
    length = model.network.config.max_length
    read = encoder_table(model.tokenizer, ["w5 " + p.text for p in PASSAGES], length)
    np.testing.assert_array_equal(frozen["passages"]["tokens"], read["tokens"])
    asked = Questions(retriever, EXAMPLES)(EXAMPLES)["question_tokens"]
    read = encoder_table(model.tokenizer, ["w3 w4 " + q for q in QUESTIONS], length)
    np.testing.assert_array_equal(asked, read["tokens"])


# --- similarity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean"])
def test_everything_that_searches_ranks_by_the_similarity(tmp_path, kind):
    use = {"similarity_fn_name": kind, "prompts": {"query": "w3 w4 ", "document": "w5 "}}
    retriever = Retriever.build(hub.load(folder(tmp_path, **use)), PASSAGES)
    right = expected(kind, ("w3 w4 ", "w5 "))
    best = np.sort(right, axis=1)[:, ::-1][:, :5]

    def check(rows, scores):
        np.testing.assert_allclose(scores, best, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(right, rows, 1), best, rtol=1e-4, atol=1e-4)

    device = DeviceIndex.build(retriever.vectors)
    silos = np.array_split(np.arange(60), 4)
    for other in (
        retriever,
        dataclasses.replace(retriever, index=device),
        over_silos(retriever, silos),
        over_silos(retriever, silos, merge="score", budget=SearchBudget(silos=4)),
    ):
        check(*other.search(QUESTIONS, 5))
    check(*retriever.search_within(QUESTIONS, [np.arange(60)] * 12, 5))
    rows = np.tile(np.arange(60), (12, 1))
    np.testing.assert_allclose(retriever.similarities(QUESTIONS, rows), right, rtol=1e-4, atol=1e-4)
    system = RAGSystem.build(PASSAGES, retriever=hub.load(tmp_path / "encoder"))
    assert system.score_scale == (20.0 if kind == "cosine" else 1.0)
    size = retriever.encoder.config.dimension
    for store in (
        FaissStore(size),
        FaissStore(size, "hnsw", effort=100),
        DeviceStore(size),
        QdrantStore("c", size),
    ):
        store.add(PASSAGES, system.embed(PASSAGES))
        found = system.over(store).retrieve(QUESTIONS, 5)
        check(
            np.array([[int(f.passage.id[1:]) for f in some] for some in found]),
            np.array([[f.score for f in some] for some in found]),
        )


def test_similarities_rank_differently_here():
    kinds = ("cosine", "dot", "euclidean")
    best = {kind: tuple(np.argsort(-expected(kind))[:, :5].ravel().tolist()) for kind in kinds}
    assert len({*best.values()}) == 3


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("train", [("query",), ("query", "document"), ("head",), ("document",)])
def test_scores_in_a_loss_are_the_similarities_of_the_search(kind, train):
    model = hub.load(GOLDEN / "bert_cls")
    retriever = Retriever.build(model, PASSAGES, **PROMPTS, similarity=kind)
    trainable, frozen = trained_parts(retriever, train)
    rows = np.arange(36).reshape(12, 3)
    batch = Questions(retriever, EXAMPLES, frozen="query" not in train)(EXAMPLES)
    batch["retrieved"] = jnp.asarray(rows)
    found = passage_scores(retriever.encoder, frozen | trainable, batch, 2.0)
    right = np.take_along_axis(expected(kind, ("w3 w4 ", "w5 ")), rows, 1)
    np.testing.assert_allclose(found, 2 * right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["dot", "euclidean"])
def test_ranking_is_by_the_similarity(kind):
    model = hub.load(GOLDEN / "bert_cls")
    retriever = Retriever.build(model, PASSAGES, similarity=kind)
    dataset = Dataset("d", PASSAGES, EXAMPLES, [], [])
    task = multiple_negatives_ranking(retriever, dataset, score_scale=0.1)
    batch = {n: jnp.asarray(x) for n, x in task.table(EXAMPLES).items()}
    batch["weight"] = jnp.ones(len(EXAMPLES))
    loss, _ = task.loss(task.trainable, task.frozen, batch, None)
    scores = 0.1 * expected(kind)[:, ::3][:, :12]
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    np.testing.assert_allclose(loss, -np.diag(log_p).mean(), rtol=1e-4)


def test_cut_vectors_are_compared_by_cosine_or_dot_product():
    model = hub.load(GOLDEN / "bert_cls")
    dataset = Dataset("d", PASSAGES, EXAMPLES, [], [])
    euclidean = Retriever.build(model, PASSAGES, similarity="euclidean")
    with pytest.raises(ConfigError, match=r"cosine or dot product.*euclidean"):
        multiple_negatives_ranking(euclidean, dataset, dimensions=(8,))
    dot = Retriever.build(model, PASSAGES, similarity="dot").cut(8)
    right = plain(QUESTIONS)[:, :8] @ plain([p.text for p in PASSAGES])[:, :8].T
    np.testing.assert_allclose(dot.search(QUESTIONS, 1)[1][:, 0], right.max(1), rtol=1e-4)


def test_another_similarity_is_refused():
    with pytest.raises(ConfigError, match=r"similarity must be one of .*'manhattan'"):
        Retriever.build(hub.load(GOLDEN / "bert_cls"), [], similarity="manhattan")
    with pytest.raises(ConfigError, match="float16 cannot hold the squared lengths"):
        Retriever.build(hub.load(GOLDEN / "bert_cls"), [], similarity="euclidean", dtype="float16")


# --- kept, and told from others ---------------------------------------------------------------------


def test_how_an_encoder_is_used_is_saved_with_it(tmp_path):
    use = PROMPTS | {"similarity": "dot"}
    system = RAGSystem.build(PASSAGES, top_k=2, **use)
    system.save(tmp_path / "system")
    again = RAGSystem.load(tmp_path / "system")
    assert again.retriever.encoder == system.retriever.encoder
    assert again.retrieve(QUESTIONS) == system.retrieve(QUESTIONS)
    told = json.loads((tmp_path / "system" / "query_encoder" / sentence_folders.USE).read_text())
    assert told == {
        "prompts": {"query": "w3 w4 ", "document": "w5 "},
        "default_prompt_name": None,
        "similarity_fn_name": "dot",
    }
    # What is given to `build` comes before what the folder tells, the empty prompt too.
    other = RAGSystem.build(PASSAGES, retriever=str(tmp_path / "system/query_encoder"),
                            query_prompt="", similarity="cosine")  # fmt: skip
    config = other.retriever.encoder.config
    assert (config.query_prompt, config.document_prompt, config.similarity) == ("", "w5 ", "cosine")
    names = [identity(s, True, PASSAGES)["retriever"] for s in (system, other, again)]
    assert names[0] == names[2] != names[1]


def test_the_command_line_offers_the_similarities_there_are():
    assert index.SIMILARITIES == SIMILARITIES


def test_a_config_names_prompts_and_similarity():
    models = compare_strategies.get_config().models
    assert load_retriever(models).network == hub.load("builtin:encoder").network
    models.query_prompt, models.similarity = "query: ", "dot"
    config = load_retriever(models).network.config
    assert (config.query_prompt, config.document_prompt, config.similarity) == (
        "query: ",
        "",
        "dot",
    )
    models.similarity = "manhattan"
    with pytest.raises(ConfigError, match=r"config\.models: .*'manhattan'"):
        load_retriever(models)


@pytest.mark.parametrize("kind", ["flat", "device"])
def test_the_command_line_sets_them_and_keeps_them(tmp_path, kind, capsys):
    (tmp_path / "documents").mkdir()
    for p in PASSAGES[:6]:
        (tmp_path / "documents" / f"{p.id}.txt").write_text(f"{p.id} {p.text}")
    command = ["index", str(tmp_path / "documents"), "--quiet", "--to"]
    told = [
        "--query-prompt",
        "query: ",
        "--document-prompt",
        "passage: ",
        "--similarity",
        "euclidean",
    ]
    at = tmp_path / "system"
    assert main([*command, str(at), "--store", kind, *told]) == 0
    system = RAGSystem.load(at)
    config = system.retriever.encoder.config
    assert (config.query_prompt, config.document_prompt) == ("query: ", "passage: ")
    (found,) = system.retrieve(["p3"], 6)
    by_hand = Retriever.build(
        hub.load("builtin:encoder"), [f.passage for f in found], query_prompt="query: ",
        document_prompt="passage: ", similarity="euclidean",
    )  # fmt: skip
    rows, scores = by_hand.search(["p3"], 6)
    assert rows[0].tolist() == [*range(6)]
    np.testing.assert_allclose(scores[0], [f.score for f in found], atol=1e-4)
    # The same documents again: what was embedded under these prompts is found again.
    assert main([*command, str(at)]) == 0
    assert main([*command, str(at), *told]) == 1
    assert (
        "--query-prompt, --document-prompt, --similarity apply to new systems only"
        in capsys.readouterr().err
    )
    assert main([*command, str(tmp_path / "like"), "--like", str(at), *told[:2]]) == 1
    assert "--like takes models and prompts from a saved system" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "like"), "--like", str(at)]) == 0
    assert RAGSystem.load(tmp_path / "like").retriever.encoder.config == config
