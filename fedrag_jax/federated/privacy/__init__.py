"""Accounting for differential privacy."""
