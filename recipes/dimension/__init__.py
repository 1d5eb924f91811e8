"""What the recipes of intrinsic dimension share."""
