"""Spell every product with a constant matrix as ``aten.linear``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir import Program, args_by_name, op_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import (
    RESHAPES,
    base,
    is_op,
    is_tensor,
    only_user,
    permutation,
    rank,
    readers,
    same_kind,
    same_size,
    same_sizes,
    sweep,
    trainable,
    val,
)

aten = torch.ops.aten
_PRODUCTS = {"aten.mm": 1, "aten.matmul": 1, "aten.addmm": 2}  # where the matrix stands among the arguments


@dataclass(frozen=True)
class RaiseLinear(Pass):
    """Turn mm, matmul and addmm with a constant matrix, and the bias added next, into linear; drop reshapes round it."""

    name = "raise-linear"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for rule in (self._product, self._bias, self._flattened):
            for node in program.nodes:
                if node._erased:
                    continue
                with program.graph.inserting_before(node):
                    new = rule(program, node, result)
                if isinstance(new, str):
                    result.refuse(site_of(node), new)
                elif new is not None:
                    result.change(site_of(node), f"{op_name(node.target)} → linear")
                    program.replace(node, new)
        sweep(program, result)
        return result

    def _product(self, program: Program, node: fx.Node, result: PassResult) -> fx.Node | str | None:
        """``x @ m`` and ``b + x @ m`` with ``m [i, o]`` constant: linear with the weight ``m.T [o, i]``."""
        place = _PRODUCTS.get(base(node))
        if place is None:
            return None
        x, matrix = node.args[place - 1], node.args[place]
        turned = permutation(matrix) == (1, 0) and program.constant(matrix.args[0]) is not None
        if not turned and (program.constant(matrix) is None or rank(matrix) != 2):
            return None
        if not val(node).dtype.is_floating_point:
            return f"its numbers are {val(node).dtype}, no floats"
        bias = None
        if place == 2:
            bias, rest = node.args[0], args_by_name(node)
            if rest["beta"] != 1 or rest["alpha"] != 1:
                return f"beta is {rest['beta']} and alpha {rest['alpha']}, not 1"
            if rank(bias) != 1 or not same_size(val(bias).shape[0], val(node).shape[-1]):
                return "what it adds is no vector with a number per column"
        if self.refused(result, node):
            return None
        weight = matrix.args[0] if turned else self._transposed(program, matrix)
        return weight if isinstance(weight, str) else program.call(aten.linear.default, x, weight, bias, like=node)

    def _transposed(self, program: Program, matrix: fx.Node) -> fx.Node | str:
        others = [
            u for u in matrix.users if u.args[_PRODUCTS.get(base(u), 0) :][:1] != (matrix,) or base(u) not in _PRODUCTS
        ]
        if others:
            return f"its matrix is read by {readers(matrix, set(matrix.users) - set(others))} too: it would be stored twice"
        name = f"{matrix.target}_transposed"
        for found in program.graph.find_nodes(op="get_attr", target=name):
            return found  # another product with the same matrix
        held = program.tensor(str(matrix.target))
        return program.add_tensor(
            name, held.detach().t().contiguous(), origin=[str(matrix.target)], trainable=trainable([held])
        )

    def _bias(self, program: Program, node: fx.Node, result: PassResult) -> fx.Node | str | None:
        """``linear(x, w) + c`` with a constant ``c [o]`` (or ``[1, .., o]``): linear with a bias."""
        if not is_op(node, "aten.add") or node.kwargs.get("alpha", 1) != 1:
            return None
        for product, added in (node.args[:2], node.args[1::-1]):
            constant = program.constant(added)
            if not is_op(product, "aten.linear") or constant is None or constant.ndim == 0:
                continue
            if product.args[2] is not None:
                return f"{site_of(product)} has a bias already"
            if constant.numel() != constant.shape[-1] or constant.shape[-1] != program_out(product):
                return f"the constant has shape {tuple(constant.shape)}, not a number per column"
            if only_user(product) is not node:
                return f"{site_of(product)} is read by {readers(product, [node])} too"
            if not same_kind(product, node) or constant.dtype != val(product).dtype:
                return "adding the constant changes dtype or shape"
            if self.refused(result, node):
                return None
            bias = added
            if constant.ndim > 1:
                bias = program.add_tensor(f"{added.target}_flat", constant.detach().reshape(-1), origin=[str(added.target)],
                                          trainable=trainable([constant]))  # fmt: skip
            return program.call(
                aten.linear.default, product.args[0], product.args[1], bias, sites=product.meta["sites"], like=node
            )
        return None

    def _flattened(self, program: Program, node: fx.Node, result: PassResult) -> fx.Node | str | None:
        """``linear(x.view(-1, i)).view(*x.shape[:-1], o)``: linear keeps leading axes by itself."""
        if not is_op(node, *RESHAPES) or not is_op(node.args[0], "aten.linear"):
            return None
        product = node.args[0]
        flat = product.args[0]
        if not is_op(flat, *RESHAPES) or not is_tensor(flat.args[0]) or only_user(product) is not node:
            return None
        x = flat.args[0]
        inner = val(x).shape
        fits = len(inner) > 0 and same_size(inner[-1], val(flat).shape[-1])
        fits = fits and same_sizes(val(node).shape, (*inner[:-1], program_out(product)))
        wanted = [*val(node).shape[:-1], val(flat).shape[-1]]
        whole = rank(flat) == 2 and same_size(val(node).shape[-1], program_out(product))
        if not fits and not (whole and all(isinstance(n, int) for n in wanted)):
            return None
        if self.refused(result, node):
            return None
        if not fits:  # rows that were something else before, heads to be merged for one, come in the result's shape at once
            x = program.call(aten.reshape.default, x, wanted, like=flat)
        return program.call(
            aten.linear.default, x, product.args[1], product.args[2], sites=product.meta["sites"], like=node
        )


def program_out(product: fx.Node) -> int:
    """How many columns a linear gives."""
    return int(val(product.args[1]).shape[0])
