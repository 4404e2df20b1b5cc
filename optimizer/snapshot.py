"""What a program was at one moment, at a microsecond or two a node: to see what a pass changed, and to go back.

A snapshot refers to the program's own nodes and tensors. Only ``restore`` makes a program of it, which costs as much as
``Program.copy``; a pipeline restores where a pass's work is thrown away, which is seldom.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule  # writes its Python code when first run: most copies never are

from graphwright.nodes import line

if TYPE_CHECKING:
    from graphwright.ir import Program


class Held(NamedTuple):
    """A node as it was. Its arguments name other nodes as they stood in it, erased since or not."""

    node: fx.Node
    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


class Mark(NamedTuple):
    """Identity and version of a tensor."""

    address: int
    version: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """What stands between two snapshots.

    Attributes:
        modified: the later one's text, or a tensor that it reads, is another.
        nodes: of the later one, in its order, those that are new or changed, those whose tensor changed, and what
            reads any of them: whatever an invariant could have been broken at, the order of nodes aside.
    """

    modified: bool
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """See the module's docstring; ``of`` takes one."""

    nodes: tuple[Held, ...]
    tensors: Mapping[str, torch.Tensor]
    marks: Mapping[str, Mark]
    _program: Program
    _provenance: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, program: Program, before: Snapshot | None = None) -> Snapshot:
        """What the program is now; what did not change since ``before`` is shared with it."""
        known = before._by_node if before is not None else {}
        nodes = tuple([_hold(n, known.get(n)) for n in program.graph.nodes])
        held = program.held()
        written = [m.buffer for m in program.signature.mutations if m.buffer]
        names = dict.fromkeys([*(str(n.target) for n in nodes if n.op == "get_attr"), *written])
        tensors = {name: held[name] for name in names if name in held}
        return cls(nodes, tensors, {name: _mark(t) for name, t in tensors.items()}, program, dict(program.provenance))

    @cached_property
    def _by_node(self) -> dict[fx.Node, Held]:
        return {held.node: held for held in self.nodes}

    def since(self, before: Snapshot) -> Difference:
        """What was changed between ``before`` and this snapshot of the same program."""
        known = before._by_node
        fresh = [now for now in self.nodes if not _same(known.get(now.node), now)]
        moved = {name for name, mark in self.marks.items() if before.marks.get(name) != mark}
        tensors = bool(moved) or self.marks.keys() != before.marks.keys()
        modified = tensors or len(self.nodes) != len(before.nodes) or self._reads_otherwise(before)
        changed = {now.node for now in fresh}
        if tensors:
            gone = self.tensors.keys()
            changed |= {n.node for n in self.nodes if n.op == "get_attr" and (n.target in moved or n.target not in gone)}
        changed |= {user for node in changed for user in node.users}
        return Difference(modified, tuple(n.node for n in self.nodes if n.node in changed))

    def _reads_otherwise(self, before: Snapshot) -> bool:
        """Whether the text differs; lines are only written where nodes are not the same."""
        pairs = zip(before.nodes, self.nodes, strict=True)
        return any(not _same(was, now) and _line(was) != _line(now) for was, now in pairs)

    def intact(self) -> bool:
        """Whether nobody has written into its tensors since."""
        return all(_mark(tensor) == self.marks[name] for name, tensor in self.tensors.items())

    def restore(self) -> Program:
        """A program of its own graph as the snapshotted one was; tensors are shared, since passes never write into one."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for held in self.nodes:
            args, kwargs = fx.node.map_arg((held.args, dict(held.kwargs)), made.__getitem__)
            new = graph.create_node(held.op, held.target, args, kwargs, held.name)
            new.meta = dict(held.meta)
            made[held.node] = new
        module = _LazyGraphModule(nn.Module(), fx.Graph())
        _plant(module, self.tensors)
        module.graph = graph
        return self._program.like(module, self._provenance)


def _hold(node: fx.Node, was: Held | None) -> Held:
    """The node as it is; ``was`` itself where that says the same."""
    args, kwargs, meta = node.args, node.kwargs, node.meta
    if (
        was is not None and was.args is args and was.kwargs is kwargs and was.target is node.target and was.name == node.name
        and was.meta.keys() == meta.keys() and all(map(operator.is_, was.meta.values(), meta.values()))
    ):  # fmt: skip
        return was
    return Held(node, node.name, node.op, node.target, args, kwargs, dict(meta))


def _mark(tensor: torch.Tensor) -> Mark:
    return Mark(tensor.data_ptr(), tensor._version, tensor.dtype, tuple(tensor.shape))


def _same(was: Held | None, now: Held) -> bool:
    """Whether a node is what it was, without looking into its arguments: fx gives a node new ones where any changes."""
    return was is now or was is not None and (
        was.node is now.node and was.args is now.args and was.kwargs is now.kwargs and was.target is now.target
        and was.meta.get("val") is now.meta.get("val") and was.meta.get("sites") == now.meta.get("sites")
        and was.name == now.name
    )  # fmt: skip


def _line(held: Held) -> str:
    return line(held.name, held.op, held.target, held.args, held.kwargs, held.meta)


def _plant(root: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Register tensors under their qualified names."""
    owners: dict[str, nn.Module] = {"": root}

    def owner(path: str) -> nn.Module:
        if path not in owners:
            above, _, leaf = path.rpartition(".")
            owners[path] = nn.Module()
            owner(above).add_module(leaf, owners[path])
        return owners[path]

    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if isinstance(tensor, nn.Parameter):
            owner(path).register_parameter(leaf, tensor)
        else:
            owner(path).register_buffer(leaf, tensor)
