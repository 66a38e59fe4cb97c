"""The memory that an experiment's process keeps between its cells."""

import ctypes
import pathlib
import subprocess
import sys

import pytest

_CODE = """
import pathlib
import numpy as np
from experiments.pages import keep_pages, return_pages

def resident():
    rows = dict(r.split(":", 1) for r in pathlib.Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) / 1024

keep_pages()
before = resident()
arrays = [np.ones(2**18) for _ in range(200)]  # 2 MiB each
last = np.ones(2**18)  # the heap's end, beyond the gap
del arrays
kept = resident()
return_pages()
print(kept - before, resident() - before)
"""


@pytest.mark.skipif(
    not (hasattr(ctypes.CDLL(None), "malloc_trim") and pathlib.Path("/proc/self/status").exists()),
    reason="needs glibc",
)
def test_free_memory_is_kept_until_it_is_returned():
    run = subprocess.run(
        [sys.executable, "-c", _CODE], capture_output=True, text=True, check=True, timeout=120
    )
    kept, left = map(float, run.stdout.split())
    assert kept > 350
    assert left < 50
