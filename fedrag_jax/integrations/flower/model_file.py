"""Saves and loads the model that a federation trained."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fedrag_jax.errors import CheckpointError
from fedrag_jax.federated.algorithm import PyTree
from fedrag_jax.files import whole
from fedrag_jax.integrations.flower.plan import Plan
from fedrag_jax.integrations.flower.wire import named

MODEL = "model.safetensors"


def save_model(plan: Plan, handed: PyTree, folder: pathlib.Path) -> None:
    """Writes `model.safetensors`: the part of the server's state that it sends to parties."""
    leaves = jax.device_get(named(handed))
    arrays = {name: np.asarray(x, order="C") for name, x in leaves.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / MODEL, "wb") as file:
        file.write(safetensors.numpy.save(arrays, {"plan": plan.fingerprint}))


def trained_by(folder: pathlib.Path) -> str:
    """Returns the fingerprint of the plan by which the model in a folder was trained.

    Raises:
      CheckpointError: no such file, or one without it.
    """
    path = folder / MODEL
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata()["plan"]
    except (OSError, safetensors.SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as a trained model ({error})") from error


def load_model(plan: Plan, folder: str | pathlib.Path) -> tuple[PyTree, PyTree]:
    """Returns the trained parameters and the frozen part of the plan's task, as `fit` returns them.

    Raises:
      CheckpointError: no such file, or a file of another plan.
    """
    path = pathlib.Path(folder) / MODEL
    like = plan.handed_out(plan.initial)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in named(like)}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if about.get("plan") != plan.fingerprint:
        raise CheckpointError(f"{path} belongs to plan {about.get('plan')}, not {plan.fingerprint}")
    leaves = [jnp.asarray(found[name]) for name in named(like)]
    state = plan.received(jax.tree.unflatten(jax.tree.structure(like), leaves))
    return state.trainable, plan.within.frozen(state, plan.task.frozen)
