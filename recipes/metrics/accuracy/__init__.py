"""The folder of a metric script."""
