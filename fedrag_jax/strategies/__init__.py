"""Strategies: which tasks run, in which order, on which part of the RAG system."""
