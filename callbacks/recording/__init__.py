"""One path through a training step: from a batch to its rows on disk."""
