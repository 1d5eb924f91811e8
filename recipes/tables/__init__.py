"""The paper's tables, one script each, on any model."""
