"""What computing in half precision does to each op of a program, measured on its own values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from graphwright.ir import Program, site_of
from graphwright.numerics import sqnr_db
from graphwright.ops import CAST, CONTRACTION, RANDOM, VIEW, OpRow, row

#: what recipes call the two halves, the dtype, and the word for it
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WORDS = {"bf16": "bfloat16", "fp16": "float16"}


def _row(node: fx.Node) -> OpRow | None:
    return row(node.target)  # type: ignore[arg-type]


def computes(node: fx.Node) -> bool:
    """Whether a kernel in half precision may be offered: an op of the table that computes a float32 tensor from float32 ones."""
    found, value = _row(node), node.meta.get("val")
    if found is None or found.traits & {VIEW, RANDOM, CAST}:
        return False
    return _float32(value) and any(_float32(n.meta.get("val")) for n in node.all_input_nodes)


def moves(node: fx.Node) -> bool:
    """Whether a node only moves values: whatever form they are in, it loses nothing beside what the form loses."""
    found = _row(node)
    return node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload) or (found is not None and VIEW in found.traits)


def _float32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _behind(node: fx.Node) -> set[fx.Node]:
    """The nodes whose values a node reads: those that move values on the way, and the ones that compute them."""
    found: set[fx.Node] = set()
    queue = list(node.all_input_nodes)
    while queue:
        source = queue.pop()
        if source.op == "call_function" and source not in found:
            found.add(source)
            if moves(source):
                queue += source.all_input_nodes
    return found


def barred(measured: Measured, floor_db: float) -> dict[fx.Node, str]:
    """Nodes whose values are not to be rounded, since what reads them does not bear it; and why."""
    found: dict[fx.Node, str] = {}
    for node, db in measured.reading.items():
        if db < floor_db:
            for source in _behind(node):
                found.setdefault(source, f"{site_of(node)} reads it and gives {_said(db)} once it is rounded to {measured.word}, {floor_db:g} dB are asked")
    return found


def _said(db: float) -> str:
    return "numbers that are not finite" if db == -math.inf else f"SQNR {db:.1f} dB"


class Measured(fx.Interpreter):
    """Runs a program in float32, and every op of ``wanted`` in one half precision beside it.

    Attributes:
        name, word: ``"fp16"``, ``"float16"``.
        worst: the least SQNR over all runs, in dB, of each op, and of the values that others move.
        reading: the same of every op that computes, in float32 on values that were rounded.
        reach: the largest size among the float32 results of each, over all runs.
        unable: why an op can't run in this dtype.
    """

    def __init__(self, program: Program, name: str, wanted: set[fx.Node]):
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.name, self.word, self.dtype, self.wanted = name, WORDS[name], NAMES[name], wanted
        self.worst: dict[fx.Node, float] = {}
        self.reading: dict[fx.Node, float] = {}
        self.reach: dict[fx.Node, float] = {}
        self.unable: dict[fx.Node, str] = {}

    def reason(self, node: fx.Node, floor_db: float) -> str | None:
        """None, or why a node is not to be done in this dtype, with the figure."""
        if node in self.unable:
            return f"it does not run in {self.word}: {self.unable[node]}"
        db, reach, info = self.worst.get(node, math.inf), self.reach.get(node, 0.0), torch.finfo(self.dtype)
        if db >= floor_db:
            return None
        if reach > info.max:
            return f"its values reach {reach:.3g}, {self.word} ends at {info.max:.5g}"
        few = f" (values stay below {reach:.2g}, where {self.word} has few bits)" if reach < info.smallest_normal else ""
        return f"{self.word} gives {_said(db)} here{few}, {floor_db:g} dB are asked"

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        value = n.target(*args, **kwargs)  # type: ignore[operator]
        if moves(n):
            for t in tree_leaves(value):
                if _float32(t):
                    self._compare(self.worst, n, t, lambda t=t: t.to(self.dtype))
            return value
        if not _float32(value) or RANDOM in getattr(_row(n), "traits", ()):
            return value
        rounded, given = fx.node.map_arg((n.args, dict(n.kwargs)), self._rounded)
        self._compare(self.reading, n, value, lambda: n.target(*rounded, **given))  # type: ignore[operator]
        if n in self.wanted and n not in self.unable:
            said = self._compare(self.worst, n, value, lambda: self._halved(n, args, kwargs))
            if said is not None:
                self.unable[n] = said
        return value

    def _rounded(self, n: fx.Node) -> Any:
        value = self.env[n]
        if not _float32(value) or n.op == "get_attr":
            return value
        short = value.to(self.dtype).float()
        # what does not fit is not held in this dtype, for a reason of its own: a mask of -3e38 says nothing of the scores beside it
        return short if torch.equal(torch.isfinite(short), torch.isfinite(value)) else value

    def _halved(self, n: fx.Node, args: Any, kwargs: Any) -> Tensor:
        """The op on numbers in half precision; sums in float32 wherever it runs."""
        given, named = self._narrow(args), self._narrow(kwargs)
        found = _row(n)
        if any(isinstance(a, Tensor) and a.device.type != "cpu" for a in tree_leaves((args, kwargs))) or found is None or CONTRACTION not in found.traits:
            return n.target(*given, **named)  # type: ignore[operator, no-any-return]
        with _SumsInFloat():  # ours by its body: within the op itself nothing is seen
            run: Callable[..., Any] = n.target if found.name.startswith("aten.") else found.reference  # type: ignore[assignment]
            return run(*given, **named)  # type: ignore[no-any-return]

    def _narrow(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.dtype == torch.float32 else value
        if isinstance(value, (tuple, list)):
            return type(value)(self._narrow(v) for v in value)
        if isinstance(value, dict):
            return {k: self._narrow(v) for k, v in value.items()}
        return self.dtype if value is torch.float32 else value

    def _compare(self, into: dict[fx.Node, float], n: fx.Node, value: Tensor, run: Callable[[], Tensor]) -> str | None:
        """Keep the SQNR of what ``run`` gives; None, or why it can't run."""
        try:
            narrow = run()
        except Exception as error:  # noqa: BLE001  an op may refuse a dtype in any way it likes
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        finite = torch.isfinite(value)
        db = math.inf
        if bool(finite.any()):
            kept, got = value[finite], narrow.float()[finite]
            db = sqnr_db(kept, got) if bool(torch.isfinite(got).all()) else -math.inf
            self.reach[n] = max(self.reach.get(n, 0.0), float(kept.abs().max()))
        into[n] = min(into.get(n, math.inf), db)
        return None


class _SumsInFloat(TorchDispatchMode):
    """Products of half precision on a processor that may have no units for them: in float32, the result rounded.

    That is what hardware does, which adds up in float32, and PyTorch's own loops without it are forty times slower.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, kwargs = row(func), kwargs or {}
        half = next((t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dtype in NAMES.values()), None)
        if half is None or found is None or CONTRACTION not in found.traits:
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.dtype == half else t, (args, kwargs))
        return tree_map(lambda t: t.to(half) if _float32(t) else t, func(*args, **kwargs))
