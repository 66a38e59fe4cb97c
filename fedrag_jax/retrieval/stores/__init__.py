"""Stores of passages that can be changed and searched while a system answers."""
