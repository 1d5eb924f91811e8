"""What operators are made of: transforms, signs and the counter-based generator."""
