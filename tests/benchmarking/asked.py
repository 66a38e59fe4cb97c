"""Questions of the built-in world that a benchmark asks, and the passages that answer them."""

from fedrag_jax.data import synthetic

WORLD = synthetic.generate(synthetic.WorldConfig())
ASKED = [e for e in WORLD.test if e.hops == 1][:24]
GOLDS = {p for e in ASKED for p in e.positive_ids}
PASSAGES = [p for p in WORLD.passages if p.id in GOLDS]
