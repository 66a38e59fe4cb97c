"""Evaluation: scores of answers and retrieval, and their uncertainty."""
