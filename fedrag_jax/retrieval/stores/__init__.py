"""Stores of passages that people add to, delete from and ask while a system answers."""
