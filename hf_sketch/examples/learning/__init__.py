"""Learning, before rows are recorded, how the gradients of each module are read."""
