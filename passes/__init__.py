"""Passes: one transformation of the IR per file."""
