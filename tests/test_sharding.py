"""The frozen base over eight devices gives what one device gives."""

import os
import pathlib
import subprocess
import sys

import pytest

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
