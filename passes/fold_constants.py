"""Compute at once what depends on constants alone."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphwright import ops
from graphwright.ir import Program, op_name, site_of, walk_nodes
from graphwright.manager import Pass, PassResult
from graphwright.passes._nodes import base, is_random, sweep, trainable, val

#: Their numbers are whatever memory held.
_UNDEFINED = (
    "aten.empty",
    "aten.empty_like",
    "aten.new_empty",
    "aten.empty_strided",
    "aten.new_empty_strided",
    "aten.empty_permuted",
)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute ops whose inputs are all constants, and sizes that are known, at optimization time.

    Args:
        max_bytes: a result that needs this much more memory than the constants it replaces is left to be computed.
    """

    name = "fold-constants"

    max_bytes: int = 1 << 20

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        self._sizes(program, result)
        known: dict[fx.Node, Tensor] = {}
        for node in program.nodes:
            inputs = constants_of(program, node, known)
            if inputs is None or not node.users:
                continue
            if reason := _reason(node):
                result.refuse(site_of(node), reason)
            elif not self.refused(result, node):
                self._compute(node, inputs, known, result)
        results: list[fx.Node] = []
        for node in reversed(list(known)):  # what is left to be computed makes its inputs results in their turn
            if all(user in known for user in node.users):
                continue
            if not isinstance(known[node], Tensor):
                del known[node]  # several results, one of which is to be left alone
                continue
            if reason := self._too_large(node, _family(node)):
                result.refuse(site_of(node), reason)
                del known[node]
            else:
                results.append(node)
        for node in reversed(results):
            _store(program, node, _family(node), known[node], result)
        sweep(program, result)
        return result

    def _sizes(self, program: Program, result: PassResult) -> None:
        for node in program.nodes:
            known = val(node)
            if isinstance(known, (int, float, bool)) and not self.refused(result, node):
                result.change(site_of(node), f"{op_name(node.target)} is {known}")
                node.replace_all_uses_with(known)  # type: ignore[arg-type]  # numbers may stand for nodes in arguments
                program.graph.erase_node(node)

    def _compute(
        self, node: fx.Node, inputs: dict[fx.Node, Tensor], known: dict[fx.Node, Tensor], result: PassResult
    ) -> None:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), inputs.__getitem__)
        try:
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001
            result.refuse(site_of(node), f"computing it failed: {error}")

    def _too_large(self, node: fx.Node, family: set[fx.Node]) -> str | None:
        freed = sum(_bytes(val(n)) for n in family if n.op == "get_attr" and all(u in family for u in n.users))
        grown = _bytes(val(node)) - freed
        return f"the result is {grown:,} bytes larger than what it replaces" if grown > self.max_bytes else None


def _reason(node: fx.Node) -> str | None:
    if is_random(node):
        return "it draws random numbers"
    if base(node) in _UNDEFINED:
        return "it gives memory without defined numbers"
    row = ops.row(node.target)
    if row is not None and ops.QUANT in row.traits:
        return "quantize and dequantize stand for how a constant is stored"
    return None


def _family(node: fx.Node) -> set[fx.Node]:
    """``node`` and the ops and constants it is computed from."""
    family, todo = {node}, [node]
    while todo:
        for n in todo.pop().all_input_nodes:
            if n not in family:
                family.add(n)
                todo.append(n)
    return family


def _store(program: Program, node: fx.Node, family: set[fx.Node], value: Tensor, result: PassResult) -> None:
    names = [str(n.target) for n in sorted(family) if n.op == "get_attr"]  # in graph order
    sources = [program.tensor(name) for name in names]
    if value.untyped_storage().nbytes() != _bytes(value) or any(_storage(value) == _storage(t) for t in sources):
        value = value.clone()  # a view would keep all of its constant alive
    stem = program.provenance.get(names[0], names)[0] if names else site_of(node).replace("#", "_")
    new = program.add_tensor(f"{stem}_folded", value, origin=names, trainable=trainable(sources))
    count = sum(1 for n in family if n.op == "call_function")
    result.change(
        site_of(node),
        f"{op_name(node.target)} computed once" + (f", with {count - 1} ops before it" if count > 1 else ""),
    )
    node.replace_all_uses_with(new)


def constants_of(
    program: Program, node: fx.Node, known: Mapping[fx.Node, Tensor] = MappingProxyType({})
) -> dict[fx.Node, Tensor] | None:
    """The tensors behind the inputs of an op that gives tensors; None where an input is neither constant nor ``known``."""
    if node.target is operator.getitem:
        return {node.args[0]: known[node.args[0]]} if node.args[0] in known else None  # type: ignore[index,dict-item]
    given = val(node) if isinstance(val(node), (tuple, list)) else [val(node)]
    if not isinstance(node.target, OpOverload) or not given or not all(isinstance(v, Tensor) for v in given):
        return None
    found: dict[fx.Node, Tensor] = {}
    for n in walk_nodes((node.args, node.kwargs)):
        tensor = known.get(n)
        if tensor is None:
            tensor = program.constant(n)
        if tensor is None:
            return None
        found[n] = tensor
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) and isinstance(value.numel(), int) else 0
