"""Kernels that fold and rotate the sides of outer products."""
