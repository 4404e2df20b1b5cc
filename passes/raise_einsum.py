"""Write einsum over two operands as the matrix product it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir import Program, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import is_op, is_tensor, rank, sweep

aten = torch.ops.aten


@dataclass(frozen=True)
class _Product:
    """Letters of both operands in the order that ``matmul`` wants, and of its result."""

    left: str
    right: str
    result: str


@dataclass(frozen=True)
class RaiseEinsum(Pass):
    """Turn einsum over two operands that one matrix product computes into permutes and matmul.

    Written so, products are seen by all passes: attention, linears with a constant weight, what stands between them.
    """

    name = "raise-einsum"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if not is_op(node, "aten.einsum") or self.refused(result, node):
                continue
            operands = list(node.args[1])  # type: ignore[call-overload]
            found = _read(str(node.args[0]), operands)
            if isinstance(found, str):
                result.refuse(site_of(node), found)
                continue
            left, right, out = _letters(str(node.args[0]))
            with program.graph.inserting_before(node):
                a = _ordered(program, operands[0], left, found.left, node)
                b = _ordered(program, operands[1], right, found.right, node)
                new = program.call(aten.matmul.default, a, b, like=node)
                new = _ordered(program, new, found.result, out, node)
            result.change(site_of(node), f"einsum {node.args[0]!r} → matmul")
            program.replace(node, new)
        sweep(program, result)
        return result


def _letters(equation: str) -> tuple[str, str, str]:
    """Both operands' letters and the result's; the result's as torch implies them where the equation leaves them out."""
    left, _, rest = equation.replace(" ", "").partition(",")
    right, arrow, out = rest.partition("->")
    if not arrow:
        out = "".join(sorted(x for x in {*left, *right} if (left + right).count(x) == 1))
    return left, right, out


def _read(equation: str, operands: list[fx.Node]) -> _Product | str:
    """The product that an einsum is, or why it is none."""
    if len(operands) != 2 or not all(map(is_tensor, operands)):
        return f"einsum over {len(operands)} operands: no single product"
    left, right, out = _letters(equation)
    if not all(x.isalpha() for x in left + right + out):
        return f"{equation!r} leaves axes unnamed"
    if any(len(set(x)) != len(x) for x in (left, right, out)):
        return f"{equation!r} takes a diagonal"
    if (len(left), len(right)) != (rank(operands[0]), rank(operands[1])):
        return f"{equation!r} does not name the axes of its operands"
    batch = "".join(x for x in out if x in left and x in right)
    summed = [x for x in left if x in right and x not in out]
    rows = "".join(x for x in out if x in left and x not in right)
    columns = "".join(x for x in out if x in right and x not in left)
    if len(summed) != 1 or len(columns) != 1 or not rows or (batch and len(rows) != 1):
        return (f"{equation!r} sums over {len(summed)} axes and keeps {len(batch)} common, {len(rows)} and {len(columns)} own ones: "
                "no single product without copies")  # fmt: skip
    if len(batch + rows) + 1 != len(left) or len(batch + columns) + 1 != len(right):
        return f"{equation!r} sums over an axis of one operand alone"
    return _Product(batch + rows + summed[0], batch + summed[0] + columns, batch + rows + columns)


def _ordered(program: Program, x: fx.Node, letters: str, wanted: str, node: fx.Node) -> fx.Node:
    if letters == wanted:
        return x
    return program.call(aten.permute.default, x, [letters.index(c) for c in wanted], sites=list(sites_of(node)))
