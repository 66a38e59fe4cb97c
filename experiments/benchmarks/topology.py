"""Described devices of a TPU topology, for which `libtpu` compiles without a TPU."""

import importlib.util
import os
from collections.abc import Sequence

from fedrag_jax.errors import ConfigError, missing

# What libtpu would ask the virtual machine that it expects to be on; and several may compile at once.
_ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
EXAMPLES = "v5e:2x4, v5p:2x2x1, v6e:4x4"


def has_libtpu() -> bool:
    """Returns whether programs can be compiled for TPUs on this machine."""
    return importlib.util.find_spec("libtpu") is not None


def devices_of(topology: str) -> Sequence:
    """Devices of a topology, `<kind>:<chips along each axis>`. Programs are compiled for them, not run.

    Raises:
      ConfigError: there is no libtpu, or it knows no such topology.
    """
    for name, value in _ALONE.items():  # read when libtpu is loaded
        os.environ.setdefault(name, value)
    import jax
    from jax.experimental import topologies

    if not has_libtpu():
        raise missing("programs for TPUs are compiled by libtpu", "tpu")
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(
            f"--topology: libtpu has no {topology!r} ({str(error).splitlines()[0]}); give one such as "
            f"{EXAMPLES}"
        ) from error
