"""The census: every class of Transformers' auto mappings, trained while tiny."""
