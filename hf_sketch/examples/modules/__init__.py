"""How the gradients of a model's modules are read, and how that is learned."""
