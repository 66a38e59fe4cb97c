"""The memory that glibc keeps for large arrays; elsewhere these functions do nothing."""

import ctypes


def keep_pages() -> None:
    """Lets glibc reuse the memory of large arrays.

    It would return each to the kernel and touch fresh pages for the next; on a virtual machine that
    is a tenth of the time of the comparison.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def return_pages() -> None:
    """Returns what is free to the kernel.

    Arrays of many sizes leave gaps that the next do not fill: without this a process that evaluates
    a model of 540 MB again and again grows by gigabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
