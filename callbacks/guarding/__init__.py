"""What a guard of training does within a run."""
