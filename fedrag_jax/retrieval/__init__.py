"""Passages and their vectors: embed, search, refresh."""
