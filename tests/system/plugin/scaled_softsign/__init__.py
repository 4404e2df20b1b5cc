"""Softsign with a scale, scale * x / (1 + |x|), as one op with kernels of its own.

A model that spells it out gets the op by the pass; a model that imports this package can call the op.
"""

from scaled_softsign.ops import scaled_softsign

__all__ = ["register", "scaled_softsign"]


def register() -> None:
    """Called by Graphwright, once, when it first looks for plug-ins."""
    from scaled_softsign import compiled, kernels, passes  # noqa: F401  importing them registers what they hold
