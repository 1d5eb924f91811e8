"""Recipes: complete runs on real data, each with a command line."""
