"""Public benchmarks, asked of one system: read, put, scored, kept."""
