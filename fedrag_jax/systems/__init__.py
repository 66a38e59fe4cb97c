"""Saved systems: made of documents, kept up with them, tuned."""
