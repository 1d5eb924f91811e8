"""Fine-tuning in a sketched subspace, and the search for its least dimension."""
