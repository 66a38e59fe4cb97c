"""The share of a client's words that its update reveals, by batch size, steps and optimizer.

    python -m experiments.benchmarks.inversion
    python -m experiments.benchmarks.inversion --part=adapters

The query encoder of the built-in system is tuned by ranking against given negatives, on randomly drawn
questions. Prints means over draws of two shares. The first is the share of the words read among as many
rows of the embedding table with the largest change. The second is the share of the words at their
positions among as many pairs that lie best in the span of the first layer's gradients; "all" means that
they span everything.

With --part=adapters, the generator's adapters are tuned, after a step on other questions (before it, B
is zero and A gets no gradient): on answers to the question alone, and to a prompt with five passages.
Prints the share of the tokens read among as many that lie best in the span of the first layer's
gradients, and the share that the most frequent tokens of other prompts find.
"""

from absl import app, flags

_PART = flags.DEFINE_enum("part", "encoder", ["encoder", "adapters"], "the trained part")
_RANK = flags.DEFINE_integer("rank", 8, "rank of the adapters of q_proj, k_proj and v_proj", 1)
_BATCHES = flags.DEFINE_list("batches", ["1", "2", "4", "16"], "numbers of questions per step")
_STEPS = flags.DEFINE_list("steps", ["1", "9"], "numbers of steps of AdamW; SGD takes one")
_DRAWS = flags.DEFINE_integer("draws", 5, "number of random draws of questions", lower_bound=1)
_RATE = flags.DEFINE_float("learning_rate", 3.2e-3, "learning rate of AdamW", lower_bound=0)
OTHERS = 16  # questions of the step before, and of prompts whose tokens are counted


def main(argv):
    del argv
    import numpy as np
    import optax

    from fedrag_jax.data import synthetic
    from fedrag_jax.models.lora import LoraConfig
    from fedrag_jax.rag import RAGSystem

    world, rng = synthetic.generate(), np.random.default_rng(0)
    lora = LoraConfig(_RANK.value, 2.0 * _RANK.value, ("q_proj", "k_proj", "v_proj"))
    system = RAGSystem.build(world.passages, world.train, adapters=lora, progress=True)
    kinds = [("SGD", optax.sgd(1.0), 1)]
    kinds += [("AdamW", optax.adamw(_RATE.value), int(steps)) for steps in _STEPS.value]

    def drawn(count):
        return [world.train[i] for i in rng.choice(len(world.train), count, replace=False)]

    attacks = of_encoder(system, world, rng) if _PART.value == "encoder" else of_adapters(system)
    for title, attack in attacks.items():
        print(title)
        for batch in map(int, _BATCHES.value):
            for name, optimizer, steps in kinds:
                found = [
                    attack(optimizer, drawn(steps * batch), steps, drawn)
                    for _ in range(_DRAWS.value)
                ]
                one, other = np.mean(found, axis=0)
                shown = "all" if np.isnan(other) else f"{other:.2f}"
                print(f"{name:9s}  {steps:5d}  {batch:5d}  {one:5.2f}  {shown}", flush=True)


def of_encoder(system, world, rng) -> dict:
    """The attack on an update of the query encoder."""
    from fedrag_jax.objectives.retriever import multiple_negatives_ranking

    negatives = {e.id: rng.choice(len(world.passages), 8, replace=False) for e in world.train}
    task = multiple_negatives_ranking(system.retriever, world, negatives=negatives)
    trained = trainer(task)

    def attack(optimizer, asked, steps, drawn):
        del drawn
        table = task.table(asked)
        update = trained(task.trainable, table, optimizer, steps)["query"]
        return words_and_places(system.retriever, update, table)

    return {"optimizer  steps  batch  words  words at their places": attack}


def of_adapters(system) -> dict:
    """The attacks on an update of the generator's adapters, by prompt."""
    from fedrag_jax.objectives.generator import closed_book, concatenated

    def rows(examples):
        return system.retriever.search([e.question for e in examples], system.top_k)[0]

    parts = system.decoder, system.generator.params, system.adapters, system.prompts
    tasks = {"question": closed_book(*parts), "five passages": concatenated(*parts, rows)}

    def attack_on(task):
        trained = trainer(task)

        def attack(optimizer, asked, steps, drawn):
            import jax
            import optax

            other, table = task.table(drawn(OTHERS)), task.table(asked)
            first = trained(task.trainable, other, optax.adamw(_RATE.value), 1)
            start = jax.tree.map(lambda y, moved: y + moved.astype(y.dtype), task.trainable, first)
            update = trained(start, table, optimizer, steps)["adapters"]
            return tokens_read(system, update, table, other)

        return attack

    title = "optimizer  steps  batch  tokens  frequent tokens"
    return {f"{title}: {name}": attack_on(task) for name, task in tasks.items()}


def trainer(task):
    """Returns a function that trains from a start, each step on the next part of a table's rows, and
    returns the update."""
    import jax
    import numpy as np
    import optax

    from fedrag_jax.evaluation.leakage import inversion

    gradient = jax.jit(jax.grad(task.loss, has_aux=True))  # compiled once for all draws

    def trained(start, table, optimizer, steps: int):
        batch = len(next(iter(table.values()))) // steps
        y, state = start, optimizer.init(start)
        for step in range(steps):
            rows = slice(step * batch, (step + 1) * batch)
            some = {name: x[rows] for name, x in table.items()}
            some["weight"] = np.ones(batch, np.float32)
            found, _ = gradient(y, task.frozen, some, jax.random.key(0))
            updates, state = optimizer.update(found, state, y)
            y = optax.apply_updates(y, updates)
        return inversion.moved(y, start)

    return trained


def words_and_places(retriever, update, table) -> tuple[float, float]:
    """Returns the share of words that an attacker recovers, anywhere and at their place."""
    import numpy as np

    from fedrag_jax.errors import DataError
    from fedrag_jax.evaluation.leakage import inversion

    mask, tokens = np.asarray(table["question_mask"], bool), np.asarray(table["question_tokens"])
    read = np.zeros(len(update["embed"]["embedding"]), bool)
    read[tokens[mask]] = True
    words = inversion.r_precision(inversion.touched(update["embed"]["embedding"]), read)
    row, place = np.nonzero(mask)
    there = np.zeros((place.max() + 1, len(read)), bool)
    there[place, tokens[row, place]] = True
    encoder, params = retriever.encoder, retriever.query
    inputs = inversion.first_inputs(encoder, params, np.arange(len(read)), len(there))
    try:
        gradient = inversion.first_gradient(update)
        outside = inversion.placed(gradient, inputs, noise=inversion.rounding(params))
    except DataError:
        return words, np.nan
    return words, inversion.r_precision(-outside.ravel(), there.ravel())


def tokens_read(system, update, table, other) -> tuple[float, float]:
    """Returns the share of tokens that an attacker recovers, and that frequent tokens find."""
    import numpy as np

    from fedrag_jax.evaluation.leakage import inversion

    params = system.generator.params
    vocabulary = len(params["embed"]["embedding"])

    def counts(of):
        tokens, lengths = np.asarray(of["tokens"]), np.asarray(of["lengths"])
        there = np.arange(tokens.shape[-1]) < lengths[..., None]
        return np.bincount(tokens[there], minlength=vocabulary)

    read = counts(table) > 0
    inputs = inversion.first_inputs_of_decoder(system.decoder, params, np.arange(vocabulary))
    outside = inversion.placed(inversion.first_gradient(update), inputs)
    return inversion.r_precision(-outside, read), inversion.r_precision(counts(other), read)


if __name__ == "__main__":
    app.run(main)
