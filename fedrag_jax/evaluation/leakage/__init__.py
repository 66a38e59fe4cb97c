"""Attacks that measure how much training and serving reveal."""
