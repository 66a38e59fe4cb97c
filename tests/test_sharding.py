"""The frozen base over eight devices gives what one device gives."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedrag_jax.federated.engine.placement import Placing

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("format", ["float32", "int8"])
def test_eight_devices_equal_one(format):
    """In a process of its own, because the number of devices is settled when JAX starts."""
    if format != "float32":
        pytest.importorskip("qwix", reason="qwix is absent")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests" / "on_eight_devices.py"), format]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("equal\n")


def test_a_change_of_a_split_base_is_placed_like_the_base():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("clients", "model"))
    split = NamedSharding(mesh, PartitionSpec(None, "model"))
    frozen = {"decoder": {"q_proj": {"kernel": jax.device_put(jnp.ones((4, 8)), split)}}}
    server = {"q_proj": {"kernel": jnp.zeros((4, 8))}, "v_proj": {"kernel": jnp.zeros((4, 8))}}
    placing = Placing(mesh, frozen, 2)
    placed = placing.everywhere(placing.beside(server, frozen))
    assert placed["q_proj"]["kernel"].sharding == split
    assert placed["v_proj"]["kernel"].sharding.spec == PartitionSpec()
    assert placing.beside((), frozen) == ()
