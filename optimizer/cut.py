"""Small programs out of large ones: values of nodes, which nodes of two programs mean the same, and sub-graphs with real inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.accelerator import random_devices
from graphwright.inference import fake_of
from graphwright.ir import Program, Signature, walk_nodes
from graphwright.structure import TENSOR, Spec, flatten_call


class _Recorder(fx.Interpreter):
    def __init__(self, program: Program, wanted: Collection[fx.Node] | None):
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.wanted, self.found = wanted, {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output" and (self.wanted is None or n in self.wanted):
            self.found[n] = value
        return value


def values_of(program: Program, leaves: Sequence[Tensor], wanted: Collection[fx.Node] | None = None) -> dict[fx.Node, Any]:
    """What nodes give when the program runs op by op on ``leaves``; mutations are not applied, random ops start from one seed.

    Args:
        wanted: these nodes only; None: all of them.
    """
    recorder = _Recorder(program, None if wanted is None else set(wanted))
    with torch.no_grad(), torch.random.fork_rng(devices=random_devices()):
        torch.manual_seed(0)
        recorder.run(*leaves)
    return recorder.found


def counterparts(before: Program, after: Program) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """Nodes of ``after``, a rewritten copy of ``before``, with the nodes of ``before`` whose values they stand for.

    Returns:
        Those that compute the same from the same, and, in graph order, those that took another node's place: nodes that
        were kept read them where they read the other before.
    """
    names = {n.name: n for n in before.graph.nodes}
    same: dict[fx.Node, fx.Node] = {}
    place: dict[fx.Node, fx.Node] = {}
    for node in after.graph.nodes:
        was = names.get(node.name)
        if was is None or was.op != node.op or (node.op != "output" and was.target != node.target):
            continue
        new, old = list(walk_nodes((node.args, node.kwargs))), list(walk_nodes((was.args, was.kwargs)))
        if len(new) != len(old) or _bare(node) != _bare(was):
            continue
        if node.op == "get_attr" and not _same_tensor(before, was, after, node):
            continue
        if all(same.get(n) is o for n, o in zip(new, old, strict=True)):
            same[node] = was
            continue
        for n, o in zip(new, old, strict=True):
            if n.name != o.name and o.op != "get_attr":  # another weight is no value of the model's
                place[n] = o
        if node.op != "output":
            place.setdefault(node, was)
    order = {n: k for k, n in enumerate(after.graph.nodes)}
    fits = {n: o for n, o in place.items() if _alike(n.meta.get("val"), o.meta.get("val"))}
    return same, dict(sorted(fits.items(), key=lambda pair: order[pair[0]]))


def _bare(node: fx.Node) -> str:
    return repr(fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: None))


def _same_tensor(before: Program, old: fx.Node, after: Program, new: fx.Node) -> bool:
    a, b = before.tensor(str(old.target)), after.tensor(str(new.target))
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype)


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and list(map(str, a.shape)) == list(map(str, b.shape))


def reads_before(outs: Sequence[fx.Node], stops: Collection[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that ``outs`` are computed from, back to ``stops``, inputs and tensors; and the ``stops`` and inputs that were met.

    An ``out`` that is itself a stop is computed all the same. Both lists are in graph order.
    """
    inside: set[fx.Node] = set()
    met: set[fx.Node] = set()
    queue = list(outs)
    first = set(outs)
    while queue:
        node = queue.pop()
        if node in inside or node in met:
            continue
        if node.op == "placeholder" or (node in stops and node not in first):
            met.add(node)
            continue
        inside.add(node)
        queue += node.all_input_nodes
    order = {n: k for k, n in enumerate(outs[0].graph.nodes)}
    return sorted(inside, key=order.__getitem__), sorted(met, key=order.__getitem__)


def cut(program: Program, outs: Sequence[fx.Node], inputs: Mapping[fx.Node, Tensor], held: Mapping[fx.Node, Any]) -> Program:
    """The part of a program that computes ``outs`` from ``inputs``, as a program of its own.

    Args:
        inputs: the nodes that become inputs, with their real values: the new program's ``example``, in this order.
        held: real values of sizes and other numbers; they are written in as they are, so that all sizes are fixed.
    """
    inside, met = reads_before(outs, inputs.keys() - set(outs))
    graph, root = fx.Graph(), nn.Module()
    memo: dict[fx.Node, Any] = {}
    mode = torch._subclasses.FakeTensorMode()
    for node, value in inputs.items():
        memo[node] = graph.create_node("placeholder", node.name, (), {}, name=node.name)
        memo[node].meta["val"] = fake_of(value, mode)
    for node in (n for n in (*inside, *met) if n.op == "get_attr" and n not in memo):
        tensor = program.tensor(str(node.target)).detach()
        _register(root, str(node.target), tensor)
        memo[node] = graph.create_node("get_attr", str(node.target), (), {}, name=node.name)
        memo[node].meta["val"] = fake_of(tensor, mode)
    for node in inside:
        if node in memo:
            continue
        value = held.get(node)
        if isinstance(value, (bool, int, float)):
            memo[node] = value
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), memo.__getitem__)
        memo[node] = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        memo[node].meta.update({k: v for k, v in node.meta.items() if k in ("sites", "trace")})
        memo[node].meta.setdefault("sites", (node.name,))
    graph.output(tuple(memo[n] for n in outs))
    spec = flatten_call(tuple(inputs.values()), {})[1]
    small = Program(fx.GraphModule(root, graph), Signature(spec, Spec("tuple", None, (), (TENSOR,) * len(outs))), mode)
    back = {new: old for old, new in memo.items() if isinstance(new, fx.Node)}
    for node in small.nodes:
        try:
            node.meta["val"] = small.infer(node)
        except Exception:  # noqa: BLE001  an opaque op need not run on fakes: its real value says the same
            node.meta["val"] = torch.utils._pytree.tree_map_only(Tensor, lambda t: fake_of(t, mode), held[back[node]])
    small.example = tuple(v.detach().clone() for v in inputs.values())
    return small


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    if leaf not in root._buffers:
        root.register_buffer(leaf, tensor)
