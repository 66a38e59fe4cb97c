"""Resident memory of a process, as Linux counts it."""

import pathlib
import resource


def peak(process: int | str = "self") -> int:
    """Returns the bytes that a process, by its number, has had resident at most.

    `resource.getrusage` would not do: it counts the peak of the program that started the process, too.
    """
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def resident() -> int:
    """Returns the bytes that this process has resident now."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()
