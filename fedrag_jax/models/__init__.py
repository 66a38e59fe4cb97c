"""Networks as pure functions of pytrees, and the checkpoints they come from."""
