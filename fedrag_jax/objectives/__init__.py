"""What one training step minimises: pure losses over pytrees and the batches they eat."""
