"""What users ask of recorded rows."""
