"""Objectives: pure losses over pytrees and batches, which a training step minimises."""
