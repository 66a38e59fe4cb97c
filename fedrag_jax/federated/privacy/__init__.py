"""Differential privacy: accounting of (ε, δ), and private local steps."""
