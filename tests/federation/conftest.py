"""Tests of federations are left out where Flower is not installed (`make test-flower` installs it), and
send it no telemetry."""

import importlib.util
import os
import warnings

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
if importlib.util.find_spec("flwr") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings():
        # Its command line's Typer takes from Click what newer ones are about to take away.
        warnings.simplefilter("ignore", DeprecationWarning)
        import flwr.serverapp  # noqa: F401
