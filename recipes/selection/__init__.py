"""Choosing training data for a target."""
