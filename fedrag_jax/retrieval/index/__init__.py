"""Indexes for training: vectors by row, searched by inner product."""
