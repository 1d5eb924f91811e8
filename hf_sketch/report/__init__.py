"""What was recorded, as one page and as plots."""
