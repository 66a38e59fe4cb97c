"""Federations in one process, and what the tests ask of them."""

import jax
import numpy as np
from loopback import Loopback
from toys import FOUR, leaves, mlp_task

from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.federated.callbacks import Callback
from fedrag_jax.federated.fit import fit
from fedrag_jax.integrations.flower.party import client_app
from fedrag_jax.integrations.flower.plan import Plan
from fedrag_jax.integrations.flower.server import run_rounds

SETTINGS = {"rounds": 3, "batch_size": 3, "seed": 11}


class Kept(Callback):
    """The model after each round."""

    def __init__(self):
        self.models = []

    def round_end(self, state, record):
        self.models.append(jax.device_get(state.state.trainable))


def plan_of(algorithm=None, task=None, data=FOUR, **changes) -> Plan:
    task = mlp_task() if task is None else task
    algorithm = fed_avg(local_steps=3) if algorithm is None else algorithm
    return Plan(task, algorithm, len(data.clients), **SETTINGS | changes)


def nodes(plan, folder, data=FOUR, numbers=None) -> dict:
    """Node 100 is client 0, and so on."""
    numbers = range(len(data.clients)) if numbers is None else numbers
    app = client_app(plan, data)
    return {
        100 + i: (app, {"partition-id": i, "fedrag-folder": str(folder / f"party {i}")})
        for i in numbers
    }


def federate(plan, folder, meddle=None, data=FOUR, apps=None, **options):
    """The result of a federation and the models of its rounds."""
    kept = Kept()
    apps = nodes(plan, folder, data) if apps is None else apps
    options = {"patience": 5.0, "callbacks": [kept]} | options
    result = run_rounds(plan, Loopback(apps, meddle), folder / "server", **options)
    return result, kept.models


def simulate(plan, data=FOUR, **changes):
    """The same in the simulator."""
    kept = Kept()
    names = "rounds", "batch_size", "optimizer", "seed"
    settings = {name: getattr(plan, name) for name in names} | changes
    result = fit(plan.task, data, plan.algorithm, callbacks=[kept], **settings)
    return result, kept.models


def assert_agree(start, models, others, share=1e-5):
    """Every round's models are equal to a share of the largest update of that round."""
    assert len(models) == len(others) > 0
    before = leaves(start)
    for model, other in zip(models, others, strict=True):
        here, there = leaves(model), leaves(other)
        np.testing.assert_allclose(here, there, rtol=0, atol=share * np.abs(there - before).max())
        assert np.abs(there - before).max() > 0
        before = there
