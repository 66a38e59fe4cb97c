"""A system as a part of other frameworks."""
