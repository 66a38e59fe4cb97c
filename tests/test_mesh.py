"""Clients over eight devices, and over two processes, give what one device gives."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from toys import FOUR, linear_task

from fedrag_jax.errors import ConfigError
from fedrag_jax.federated.fed_avg import fed_avg
from fedrag_jax.federated.fit import fit

ROOT = pathlib.Path(__file__).parent.parent


def start(*arguments, devices):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests" / "on_a_mesh.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def require_equal(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    assert out.endswith("equal\n")


def test_eight_devices_equal_one():
    require_equal(start("devices", devices=8))


DECOMPOSE = """
import numpy as np
from experiments.launch import virtual_devices
virtual_devices(2)
import jax
from jax.sharding import Mesh, PartitionSpec
assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("clients",))

def svd(x):
    return jax.numpy.linalg.svd(jax.lax.psum(x, "clients")[0], full_matrices=False)

specs = {"in_specs": PartitionSpec("clients"), "out_specs": PartitionSpec(), "check_vma": False}
run = jax.jit(jax.shard_map(svd, mesh=mesh, **specs))
x = np.random.default_rng(0).normal(size=(2, 4, 192, 192)).astype(np.float32)
for _ in range(20):
    u, s, vt = jax.block_until_ready(run(x))
np.testing.assert_allclose((u * s[:, None]) @ vt, x.sum(0), atol=1e-3)
"""


def test_decompositions_do_not_wait_for_each_other():
    """FlexLoRA's, of which every device does the same: minutes, where pools of threads meet."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for name in ("XLA_FLAGS", "OPENBLAS_NUM_THREADS"):
        environment.pop(name, None)
    subprocess.run(
        [sys.executable, "-c", DECOMPOSE], check=True, timeout=30, cwd=ROOT, env=environment
    )


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start("process", number, port, tmp_path, devices=1) for number in range(2)]
    for process in processes:
        require_equal(process)


def test_a_mesh_needs_the_axis():
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    with pytest.raises(ConfigError, match=r"needs an axis 'clients', it has \['model'\]"):
        fit(linear_task(), FOUR, fed_avg(), mesh=mesh)
