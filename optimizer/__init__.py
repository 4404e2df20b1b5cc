"""Graphwright: a compiler-style optimizer for PyTorch models.

    import graphwright as gw
    fast = gw.optimize(model, example_inputs)
"""

from graphwright.errors import GraphwrightError

__version__ = "0.1.0"
__all__ = ["GraphwrightError", "__version__"]
