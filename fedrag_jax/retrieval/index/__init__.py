"""Vectors by row, searched by inner product: what training searches."""
