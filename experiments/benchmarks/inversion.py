"""The share of a client's questions that its update reveals, by batch size, steps and optimizer.

    python -m experiments.benchmarks.inversion

The query encoder of the built-in system is tuned by ranking against given negatives, on randomly drawn
questions. Prints means over draws of two shares. The first is the share of the words read among as many
rows of the embedding table with the largest change. The second is the share of the words at their
positions among as many pairs that lie best in the span of the first layer's gradients; "all" means that
they span everything.
"""

from absl import app, flags

_BATCHES = flags.DEFINE_list("batches", ["1", "2", "4", "16"], "numbers of questions per step")
_STEPS = flags.DEFINE_list("steps", ["1", "9"], "numbers of steps of AdamW; SGD takes one")
_DRAWS = flags.DEFINE_integer("draws", 5, "number of random draws of questions", lower_bound=1)
_RATE = flags.DEFINE_float("learning_rate", 3.2e-3, "learning rate of AdamW", lower_bound=0)


def main(argv):
    del argv
    import jax
    import numpy as np
    import optax

    from fedrag_jax.data import synthetic
    from fedrag_jax.objectives.retriever import multiple_negatives_ranking
    from fedrag_jax.rag import RAGSystem

    world, rng = synthetic.generate(), np.random.default_rng(0)
    system = RAGSystem.build(world.passages, world.train, progress=True)
    negatives = {e.id: rng.choice(len(world.passages), 8, replace=False) for e in world.train}
    task = multiple_negatives_ranking(system.retriever, world, negatives=negatives)
    gradient = jax.jit(jax.grad(task.loss, has_aux=True))
    kinds = [("SGD", optax.sgd(1.0), 1)]
    kinds += [("AdamW", optax.adamw(_RATE.value), int(steps)) for steps in _STEPS.value]

    def drawn(count):
        return [world.train[i] for i in rng.choice(len(world.train), count, replace=False)]

    print("optimizer  steps  batch  words  words at their places")
    for batch in map(int, _BATCHES.value):
        for name, optimizer, steps in kinds:
            found = [
                told(system, task, gradient, optimizer, drawn(steps * batch), steps, batch)
                for _ in range(_DRAWS.value)
            ]
            words, placed = np.mean(found, axis=0)
            shown = "all" if np.isnan(placed) else f"{placed:.2f}"
            print(f"{name:9s}  {steps:5d}  {batch:5d}  {words:5.2f}  {shown}", flush=True)


def told(system, task, gradient, optimizer, asked, steps: int, batch: int) -> tuple[float, float]:
    """Returns the share of words that an attacker recovers, anywhere and at their place."""
    import jax
    import numpy as np
    import optax

    from fedrag_jax.errors import DataError
    from fedrag_jax.evaluation.leakage import inversion

    table = task.table(asked)
    y, state = task.trainable, optimizer.init(task.trainable)
    for step in range(steps):
        rows = slice(step * batch, (step + 1) * batch)
        some = {name: x[rows] for name, x in table.items()}
        some["weight"] = np.ones(batch, np.float32)
        found, _ = gradient(y, task.frozen, some, jax.random.key(0))
        updates, state = optimizer.update(found, state, y)
        y = optax.apply_updates(y, updates)
    update = inversion.moved(y, task.trainable)["query"]
    mask, tokens = np.asarray(table["question_mask"], bool), np.asarray(table["question_tokens"])
    read = np.zeros(len(update["embed"]["embedding"]), bool)
    read[tokens[mask]] = True
    words = inversion.r_precision(inversion.touched(update["embed"]["embedding"]), read)
    row, place = np.nonzero(mask)
    there = np.zeros((place.max() + 1, len(read)), bool)
    there[place, tokens[row, place]] = True
    encoder, params = system.retriever.encoder, system.retriever.query
    inputs = inversion.first_inputs(encoder, params, np.arange(len(read)), len(there))
    try:
        gradient = inversion.first_gradient(update)
        outside = inversion.placed(gradient, inputs, noise=inversion.rounding(params))
    except DataError:
        return words, np.nan
    return words, inversion.r_precision(-outside.ravel(), there.ravel())


if __name__ == "__main__":
    app.run(main)
