"""Compression of messages between clients and server: codecs, one file per family."""
