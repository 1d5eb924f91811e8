"""One rule per kind of module: how its weights get their per-example gradients."""
