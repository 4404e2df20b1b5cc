"""Move transposes and reshapes to where they meet, and cancel them.

Which memory format a convolution runs in is a measured choice of lowering; this pass does what is certain: ops between
transposes are computed on what was transposed wherever every way out of them is a transpose, too, that joins or undoes the
first one, or the axes that moved are gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphwright.ir import Program, site_of, sites_of
from graphwright.manager import Pass, PassResult
from graphwright.passes import _sink as sink
from graphwright.passes._nodes import base, is_tensor, permutation, renew, same_layout, sweep, val
from graphwright.passes.canonicalize import RULES, reshape

#: What is moved once may meet what lies further on; each round costs a walk over the program.
ROUNDS = 4


@dataclass(frozen=True)
class Layout(Pass):
    """Move transposes and reshapes through the ops between them, where two of them become one, or none."""

    name = "layout"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        strides = [_strides(o) for o in program.output.args[0]]
        left_out = {n for n in program.nodes if sink.entry(n) is not None and self.refused(result, n)}
        for _ in range(ROUNDS):
            _chained(program, left_out, result)
            _joined(program, left_out, result)
            moved = _round(program, left_out, result)
            if not moved:
                break
            renew(program, [n for n in moved if not n._erased])
            sweep(program, result)
        _restore(program, strides)
        sweep(program, result)
        return result


def _chained(program: Program, left_out: set[fx.Node], result: PassResult) -> None:
    """A transpose of a transpose: what stood between them may be gone by now."""
    for end in program.nodes:
        outer, inner = permutation(end), permutation(end.args[0]) if end.args else None
        if outer is None or inner is None or end in left_out or end.args[0] in left_out:
            continue
        order, source = [inner[d] for d in outer], end.args[0].args[0]  # type: ignore[union-attr]
        result.change(site_of(end), "transposes joined")
        if order == sorted(order):
            end.replace_all_uses_with(source)  # type: ignore[arg-type]
            program.graph.erase_node(end)
        else:
            end.args = (source, order)


def _joined(program: Program, left_out: set[fx.Node], result: PassResult) -> None:
    """A reshape of a reshape: what stood between them, or read the first one beside, may be gone by now."""
    for node in program.nodes:
        if RULES.get(base(node)) is not reshape or node in left_out or node.args[0] in left_out:
            continue
        with program.graph.inserting_before(node):
            new = reshape(program, node)
        if not isinstance(new, fx.Node):
            continue
        result.change(site_of(node), "reshapes joined")
        if new in node.all_input_nodes or not same_layout(new, node):
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)
            renew(program, [new])
        else:
            program.replace(node, new)


def _strides(out: object) -> list[str] | None:
    return [str(s) for s in val(out).stride()] if is_tensor(out) else None


def _restore(program: Program, strides: list[list[str] | None]) -> None:
    """Outputs that were contiguous are so again: their reader may take views of them."""
    outs = list(program.output.args[0])
    for k, (out, was) in enumerate(zip(outs, strides, strict=True)):
        if was is None or _strides(out) == was:
            continue
        with program.graph.inserting_before(program.output):
            copy = program.call(torch.ops.aten.clone.default, out, memory_format=torch.contiguous_format, like=out)
        if _strides(copy) == was:
            outs[k] = copy
        else:
            program.graph.erase_node(copy)
    if any(a is not b for a, b in zip(outs, program.output.args[0], strict=True)):
        program.output.args = (tuple(outs),)


def _round(program: Program, left_out: set[fx.Node], result: PassResult) -> list[fx.Node]:
    """Every region that is worth it and reads nothing that this round has changed; the nodes whose values changed."""
    views: dict[fx.Node, sink.View] = {}
    plans: dict[fx.Node, sink.Carried] = {}
    for node in program.nodes:
        view = None if node in left_out else sink.entry(node)
        if view is not None:
            views[node] = view
        elif any(n in views for n in node.all_input_nodes):
            plan = sink.carry(program, node, views)
            if plan is not None:
                views[node], plans[node] = plan[0], plan
    _prune(plans, views)
    changed: set[fx.Node] = set()
    moved: list[fx.Node] = []
    regions = [(r, {n for m in r for n in m.all_input_nodes if n in views and n not in plans}) for r in _regions(plans, views)]
    for region, entries in regions:  # known before the first of them moves: what it joins may be where another starts
        if any(e._erased for e in entries) or not _worth(region, entries, views) or any(e in changed or e.args[0] in changed for e in entries):
            continue
        moved += _move(program, region, entries, plans, views, result)
        changed.update(region, *(m.users for m in region))
    return moved


def _prune(plans: dict[fx.Node, sink.Carried], views: dict[fx.Node, sink.View]) -> None:
    """Leave only ops whose inputs are all there and whose every reader is content."""

    def fits(node: fx.Node) -> bool:
        if any(n in views and n not in plans and sink.entry(n) is None for n in node.all_input_nodes):
            return False  # what it reads is computed as it was
        view = views[node]
        return view.nothing or all(u in plans or sink.meets(u, view) for u in node.users)

    todo = list(plans)
    while todo:
        node = todo.pop()
        if node in plans and not fits(node):
            del plans[node]
            todo += [n for n in (*node.users, *node.all_input_nodes) if n in plans]


def _regions(plans: dict[fx.Node, sink.Carried], views: dict[fx.Node, sink.View]) -> list[list[fx.Node]]:
    """The ops that hang together, directly or by what they read, each in program order."""
    head: dict[fx.Node, fx.Node] = {}

    def find(n: fx.Node) -> fx.Node:
        while head.setdefault(n, n) is not n:
            head[n] = head[head[n]]
            n = head[n]
        return n

    for node in plans:
        for n in node.all_input_nodes:
            if n in views:
                head[find(n)] = find(node)
    regions: dict[fx.Node, list[fx.Node]] = {}
    for node in plans:
        regions.setdefault(find(node), []).append(node)
    return list(regions.values())


def _worth(region: list[fx.Node], entries: set[fx.Node], views: dict[fx.Node, sink.View]) -> bool:
    """Whether a transpose or reshape goes away; none is ever added."""
    inside = set(region)
    if any(all(u in inside for u in e.users) for e in entries):
        return True
    return any(not views[n].nothing and u not in inside and sink.cancels(u, views[n]) for n in region for u in n.users)


def _move(program: Program, region: list[fx.Node], entries: set[fx.Node], plans: dict[fx.Node, sink.Carried],
          views: dict[fx.Node, sink.View], result: PassResult) -> list[fx.Node]:  # fmt: skip
    inside, ends = set(region), []
    for node in region:
        for n in node.all_input_nodes:
            if n in entries:
                node.replace_input_with(n, n.args[0])  # type: ignore[arg-type]
        plans[node][1]()
        node.meta["val"] = program.infer(node)
        if not views[node].nothing:
            ends += [(node, u) for u in node.users if u not in inside]
    across = f"across {len(region)} op{'s' if len(region) > 1 else ''}"
    for last, end in ends:
        what = "transposes" if isinstance(views[last], sink.Turned) else "reshapes"
        result.change(site_of(end), f"{what} joined {across}")
        if sink.join(program, end, views[last]):
            last.meta["sites"] = tuple(dict.fromkeys([*sites_of(last), *sites_of(end)]))
            end.replace_all_uses_with(last)
            program.graph.erase_node(end)
        else:
            sink.as_reshape(end)
            end.meta["val"] = program.infer(end)
    if not ends:
        result.change(site_of(region[-1]), f"computed before the transpose, {across}")
    return region
