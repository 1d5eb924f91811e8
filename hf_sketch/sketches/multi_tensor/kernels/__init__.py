"""Triton kernels of the passes over many tensors, imported when they launch."""
