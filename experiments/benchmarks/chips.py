"""Published figures of devices: operations per second, memory and its bandwidth."""

from typing import NamedTuple

from fedrag_jax.errors import ConfigError


class Chip(NamedTuple):
    """One device.

    Attributes:
      peak: bfloat16 operations a second, without sparsity.
      memory: bytes.
      bandwidth: bytes a second of the memory.
    """

    peak: float
    memory: float
    bandwidth: float


# By a part of `device_kind`. TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; GPUs: data sheets
# of the SXM boards and of the L4.
CHIPS = {
    "H100": Chip(989e12, 80e9, 3.35e12),
    "H200": Chip(989e12, 141e9, 4.8e12),
    "A100": Chip(312e12, 80e9, 2.04e12),
    "L4": Chip(121e12, 24e9, 300e9),
    "TPU v4": Chip(275e12, 32e9, 1.2e12),
    "TPU v5 lite": Chip(197e12, 16e9, 819e9),
    "TPU v5p": Chip(459e12, 95e9, 2.765e12),
    "TPU v5": Chip(459e12, 95e9, 2.765e12),  # what v5p calls itself
    "TPU v6 lite": Chip(918e12, 32e9, 1.64e12),
}


def known(kind: str) -> Chip | None:
    """The chip of a `device_kind`, if it is in the table."""
    return next((chip for name, chip in CHIPS.items() if name in kind), None)


def chip_of(kind: str) -> Chip:
    """Returns the chip of a `device_kind`.

    Raises:
      ConfigError: it is not in the table.
    """
    if (chip := known(kind)) is None:
        raise ConfigError(
            f"nothing is known of {kind!r}: add its peak, memory and bandwidth to "
            "experiments/benchmarks/chips.py"
        )
    return chip
