"""Graphwright: a compiler-style optimizer for PyTorch models."""
