"""Studies of what answers are worth beyond the score of one training."""
