"""The memory of compiled rounds, compared with what the device has left."""

import functools
import pathlib
import warnings

import jax

_MEMORY = pathlib.Path("/proc/meminfo")  # of Linux


@functools.lru_cache(maxsize=32)  # asked in every round, and slow
def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that a program holds on a device at once (arguments, results and scratch), as
    the compiler reports them; 0 if unknown."""
    memory = compiled.memory_analysis()
    return 0 if memory is None else memory.argument_size_in_bytes + _beside_arguments(memory)


@functools.lru_cache(maxsize=32)  # once, before the first run: then it holds what it needs
def warn_of_shortage(compiled: jax.stages.Compiled) -> None:
    """Warns before a program runs that needs more memory than is free, beside its arguments.

    Without the warning, the operating system ends the process, and nothing says why.
    """
    memory, free = compiled.memory_analysis(), free_bytes()
    if memory is None or free is None or (needs := _beside_arguments(memory)) <= free:
        return
    warnings.warn(
        f"a round needs {needs / 1e9:.3g} GB of memory, but {free / 1e9:.3g} GB are free, so it may be "
        "ended by the operating system: use smaller batches, fewer passages per question, a smaller "
        'group_size, or recompute more in the backward pass (network.recomputing("full"), '
        "config.models.remat, fedrag train --remat full)",
        stacklevel=2,
    )


def free_bytes() -> int | None:
    """Returns the free memory of the first device; None if it is not known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if jax.default_backend() != "cpu" or not _MEMORY.exists():
        return None
    rows = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
    return 1024 * int(rows["MemAvailable"].split()[0])


def _beside_arguments(memory) -> int:
    held = memory.output_size_in_bytes + memory.temp_size_in_bytes
    return held - memory.alias_size_in_bytes
