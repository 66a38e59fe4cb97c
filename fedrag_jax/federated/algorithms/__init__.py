"""Algorithms: what many clients' updates become, a file each."""
