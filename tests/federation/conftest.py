"""Tests of federations skip where Flower is not installed, and send it no telemetry."""

import os

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedrag-jax[flower]'")
