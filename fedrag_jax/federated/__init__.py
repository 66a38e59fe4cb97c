"""Many clients, one model: local updates, aggregation, rounds."""
