"""Agreement between the processes of one run, each of which has its own files.

The trained parameters are the same in all processes, so nothing needs to be sent. But a process must
not continue from a file that another process has lost, or it would wait for the other forever.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def everywhere(done: bool) -> bool:
    """Returns whether a condition holds in every process."""
    if jax.process_count() == 1:
        return done
    return bool(multihost_utils.process_allgather(np.array([done])).all())
