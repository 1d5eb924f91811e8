"""Checks of what the files of a store claim, before anything uses it."""
