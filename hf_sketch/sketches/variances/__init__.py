"""Variances of squared norms of sketches."""
