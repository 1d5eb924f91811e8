"""Eigenvalues of large symmetric operators."""
