"""What a run leaves behind: logs, checkpoints, costs, figures."""
