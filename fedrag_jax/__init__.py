"""Federated fine-tuning of retrieval-augmented generation, simulated in JAX."""

__version__ = "0.1.0"
