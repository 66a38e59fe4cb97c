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
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
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


def require_equal(process, timeout=600):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, err[-4000:]
    assert out.endswith("equal\n")


@pytest.mark.slow
def test_eight_devices_equal_one():
    require_equal(start("devices", devices=8))


@pytest.mark.slow
def test_what_stands_around_algorithms_is_the_same_over_devices():
    require_equal(start("around", devices=2))


@pytest.mark.slow
def test_devices_decompose_at_the_same_time():
    require_equal(start("decompositions", devices=2), timeout=300)


@pytest.mark.slow
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
