"""A gradient of many tensors, sketched in a few launches."""
