"""The Triton kernels of the passes, whose modules are imported at a launch."""
