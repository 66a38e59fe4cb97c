"""Public benchmarks: reads questions, asks a system, scores and stores the answers."""
