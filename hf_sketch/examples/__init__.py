"""Per-example gradients out of one backward pass."""
