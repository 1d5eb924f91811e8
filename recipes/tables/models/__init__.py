"""The models that the scripts train or measure."""
