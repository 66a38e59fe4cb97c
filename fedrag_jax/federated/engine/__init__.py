"""A round as one compiled program, and where it runs."""
