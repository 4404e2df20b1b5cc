"""Checks for passes and kernels of one's own: the same that Graphwright's have to pass.

    gw.testing.check_kernel(kernel)     # all of its samples against the op's reference in float64
    gw.testing.check_pass(MyPass())     # invariants, numbers, truthfulness, settling, include / exclude
"""

from graphwright.testing.kernels import check_kernel
from graphwright.testing.passes import Checked, check_pass

__all__ = ["Checked", "check_kernel", "check_pass"]
