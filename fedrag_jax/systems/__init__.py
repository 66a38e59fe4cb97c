"""Saved systems: built from documents, updated when they change, and tuned."""
