"""Robust rules that combine updates, some of them hostile or broken, into one; one file per family."""
