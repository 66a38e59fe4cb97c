"""One compilation cache and one embedding cache for the whole suite, and a word on the real data."""

import os
import pathlib
import tempfile

import pytest

_CACHE = pathlib.Path(tempfile.gettempdir()) / "fedrag_jax_tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("FEDRAG_CACHE", str(_CACHE / "embeddings"))
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# An array with an axis too few is an error here, and does not stretch.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# FAISS's threads would spin while they wait, and keep busy cores from what they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_report_header(config):
    data = pathlib.Path(os.environ.get("FEDRAG_DATA", "../shared/data"))
    found = (data / "squad.questions.jsonl.gz").exists()
    return f"real data: {'runs on ' + str(data) if found else f'skipped, no sets in {data}'}"


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Compiled programs take several maps of memory each, of which Linux gives a process 65,530."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture
def strict_types():
    """No array's type is changed by what it meets; not for tests that train, because optax does it."""
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def tiny():
    """A decoder and its parameters."""
    import jax
    from tiny import TINY

    from fedrag_jax.models.decoder import Decoder
    from fedrag_jax.models.network import Network

    network = Network.of(Decoder, TINY)
    return network, network.init(jax.random.key(0))


@pytest.fixture(scope="module")
def qdrant():
    """The address of a server of Qdrant."""
    from qdrant_server import served

    with served() as address:
        yield address
