"""Compression of what clients and server send each other: codecs, a file for each family."""
