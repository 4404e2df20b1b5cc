"""The pass: what models write becomes the op."""

from dataclasses import dataclass

import graphwright as gw


@gw.register_pass(stage="raise")
@dataclass(frozen=True)
class RaiseSoftsign(gw.RewritePass):
    """Turn x / (1 + |x|), with a factor or without, into scaled_softsign."""

    name = "raise-softsign"

    def pattern(self, op, x, scale):
        below = op.abs(x) + 1
        return (x * scale) / below, x / below

    def check(self, match):
        if not match.val("x").dtype.is_floating_point:
            return "x is no float tensor"
        scale = match.bound.get("scale", 1.0)
        return None if isinstance(scale, (int, float)) else "the factor is no number"

    def replace(self, op, x, scale=1.0):
        return op.scaled_softsign.softsign(x, float(scale))
