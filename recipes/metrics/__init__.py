"""Metric scripts that `evaluate` loads from their folders, without the Hub."""
