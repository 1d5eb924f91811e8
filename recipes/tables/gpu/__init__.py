"""What a GPU gives and what the sketches take of it, in one run of eight minutes."""
