"""The records of a run: logs, checkpoints, costs and the manifest."""
