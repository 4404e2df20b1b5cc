"""Kernels: one fused op per file. Nothing heavy is imported here."""
