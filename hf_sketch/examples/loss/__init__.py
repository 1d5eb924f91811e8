"""The loss of a batch as the sum of its examples' own."""
