"""One map over all trainable parameters of a model."""
