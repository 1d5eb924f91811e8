"""The subspace beside other methods of parameter-efficient fine-tuning."""
