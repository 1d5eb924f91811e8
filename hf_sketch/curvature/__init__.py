"""Hessian-vector products and their relatives."""
