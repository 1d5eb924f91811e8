"""Which examples of the training set the rows of a batch belong to."""
