"""Try a rewrite of one site on the program's example, against float64, before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir import Program, args_by_name
from graphwright.numerics import Exact

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def values(program: Program, wanted: set[fx.Node]) -> dict[fx.Node, Tensor]:
    """What those nodes give on the program's example; every op before the last of them is run once."""
    found: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in wanted:
                found[n] = value
            return value

    if wanted:
        with torch.no_grad():
            Recorder(program.graph_module).run(*program.example)
    return found


def evaluate(program: Program, node: fx.Node, known: Mapping[fx.Node, Tensor], *, double: bool = False,
             changed: Mapping[fx.Node, Mapping[str, Tensor | None]] | None = None) -> Tensor:  # fmt: skip
    """``node`` from the values of ``known`` nodes and the program's constants.

    Args:
        double: in float64, dtype arguments included.
        changed: arguments of nodes, by name, that are tensors for this evaluation.
    """
    memo: dict[fx.Node, Any] = {}

    def widen(value: Any) -> Any:
        if double and isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double()
        return torch.float64 if double and value in _FLOATS else value

    def of(n: fx.Node) -> Any:
        if n in memo:
            return memo[n]
        if n in known:
            memo[n] = widen(known[n])
        elif n.op == "get_attr":
            memo[n] = widen(program.tensor(str(n.target)))
        else:
            new = (changed or {}).get(n, {})
            if new:
                given = {**args_by_name(n), **new}
                names = [a.name for a in n.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]
                args, kwargs = tuple(given[k] for k in names), {k: given[k] for k in n.kwargs}
            else:
                args, kwargs = n.args, dict(n.kwargs)
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: of(a) if isinstance(a, fx.Node) else widen(a) if isinstance(a, torch.dtype) else a)  # type: ignore[misc]
            memo[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return memo[n]

    with torch.no_grad():
        return of(node)


def failure(program: Program, old: fx.Node, known: Mapping[fx.Node, Tensor], new: Tensor) -> str | None:
    """None, or how ``new`` in the stead of what ``old`` gives breaks the exact rule; ``known``: what ``old`` is computed from."""
    reference = evaluate(program, old, known, double=True)
    return Exact().failure(reference, evaluate(program, old, known), new)
