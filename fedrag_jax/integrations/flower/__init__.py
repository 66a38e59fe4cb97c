"""Federated training across machines, on Flower: the same task and algorithm as `fit` simulates.

    plan = Plan(task, fed_avg(local_steps=3), clients=3, rounds=8)
    app = client_app(plan, my_examples)            # at each party
    app = server_app(plan, "runs/federation")      # at the server

pip install 'fedrag-jax[flower]'
"""

from fedrag_jax.errors import missing

try:
    import flwr.app  # noqa: F401
except ImportError as error:
    raise missing(f"training across machines needs flwr ({error})", "flower") from error
