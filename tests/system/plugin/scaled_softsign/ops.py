"""The op: its reference is its implementation, its shape rule and its gradient."""

from torch import Tensor

import graphwright as gw


@gw.register_op("scaled_softsign.softsign", traits={"elementwise"}, flops=lambda args, out: 4 * out.numel())
def scaled_softsign(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x / (1 + |x|)."""
    return scale * x / (1 + x.abs())
