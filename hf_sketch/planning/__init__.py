"""What recording a training run will cost, from a config alone."""
