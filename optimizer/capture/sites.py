"""Where a node comes from: its site (module path, op and occurrence) and the user's line."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

#: The wrapper's name for the user's model: the first part of every path that torch.export reports.
WRAPPED = "model"

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PYTHON = os.path.dirname(os.path.abspath(os.__file__))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


@dataclass(frozen=True)
class Origin:
    """Where one node of the traced graph comes from.

    Attributes:
        path: the innermost module's qualified name, ``""`` for the model itself.
        call: tells the calls of one module apart.
        primary: traced as it is, not made by us while making another node functional.
        trace: ``"file.py:12"``, the innermost line outside torch.
    """

    path: str = ""
    call: str = ""
    primary: bool = True
    trace: str | None = None


def origin(node: fx.Node) -> Origin:
    """The origin of a node that torch.export traced."""
    path, call = "", ""
    for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items():
        if name == WRAPPED or name.startswith(f"{WRAPPED}."):
            path, call = name.partition(".")[2], key
    return Origin(path, call, True, user_line(node.meta.get("stack_trace")))


def user_line(stack: str | None) -> str | None:
    """The innermost frame of a printed stack that lies outside torch and Graphwright, as ``"file.py:12"``."""
    for file, line in reversed(_FRAME.findall(stack or "")):
        if outside_torch(file):
            return f"{short_path(file)}:{line}"
    return None


def outside_torch(file: str) -> bool:
    """Whether a source file is the user's (or a library's above torch), not torch's, Graphwright's or Python's own."""
    full = os.path.abspath(file)
    installed = f"{os.sep}site-packages{os.sep}" in full  # may lie inside the folder of Python's own modules
    return not full.startswith((_TORCH + os.sep, _OWN + os.sep)) and not file.startswith("<") and (installed or not full.startswith(_PYTHON + os.sep))


@lru_cache(maxsize=1024)
def short_path(full: str) -> str:
    """``full`` without the folder it was imported from: the same words on every machine."""
    full = os.path.abspath(full)
    roots = [os.path.abspath(p or os.curdir) + os.sep for p in [*sys.path, os.curdir]]
    return full[max((len(r) for r in roots if full.startswith(r)), default=0) :]


def name_sites(model: nn.Module, nodes: Iterable[tuple[fx.Node, Origin]], prefix: str = "") -> None:
    """Give every op node its site.

    The op of a leaf module is called by the module's path; any other by the path and the op's name. Repeats get
    ``#2``, ``#3``. Scalar and tuple-access nodes get no site.
    """
    ops = [(n, o) for n, o in nodes if isinstance(n.target, OpOverload) and not _scalar(n)]
    primary = Counter(o.call for _, o in ops if o.primary)
    last = {o.call: n for n, o in ops if o.primary}
    leaves: dict[str, Any] = {}
    taken: Counter[str] = Counter()
    for node, where in nodes:
        node.meta["sites"] = ()
        if where.trace:
            node.meta["trace"] = where.trace
    for node, where in ops:
        if where.path not in leaves:
            leaves[where.path] = _leaf(model, where.path)
        kind = leaves[where.path]
        whole = where.primary and kind is not None and (
            primary[where.call] == 1 or (kind == "torch" and last[where.call] is node))  # fmt: skip
        op = node.target._schema.name.partition("::")[2].rstrip("_")  # type: ignore[union-attr]
        path = f"{prefix}.{where.path}".strip(".")
        name = path if whole and path else f"{path}.{op}".lstrip(".")
        taken[name] += 1
        node.meta["sites"] = (name if taken[name] == 1 else f"{name}#{taken[name]}",)


def _scalar(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _leaf(model: nn.Module, path: str) -> str | None:
    """``"torch"`` or ``"user"`` for a module without children, by where its class is defined."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    if any(True for _ in module.children()):
        return None
    return "torch" if type(module).__module__.startswith("torch.") else "user"
