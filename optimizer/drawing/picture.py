"""The shape of a program for drawing: ops, what feeds them, and how to fold them into as many boxes as one can read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphwright.nodes import describe, op_name, site_of, walk_nodes

if TYPE_CHECKING:
    from graphwright.ir import Program

#: Boxes that fit into one picture.
READABLE = 64
_TOO_FEW = 8


@dataclass(frozen=True)
class Dot:
    """One node of the graph.

    Attributes:
        site: its first site, or its name.
        step: equal for nodes that one kernel serves; empty where a node has one for itself, or none is known.
    """

    name: str
    site: str
    op: str
    shape: str
    step: str = ""


@dataclass(frozen=True)
class Picture:
    """A program without its constants.

    Attributes:
        dots: inputs, ops and the output, in graph order.
        edges: positions in ``dots``: from, to; always forwards.
    """

    dots: list[Dot]
    edges: list[tuple[int, int]]

    @classmethod
    def of(cls, program: Program, steps: Mapping[str, str] | None = None) -> Picture:
        """The picture of a program; ``steps``: by node name, see ``Dot.step``."""
        steps = steps or {}
        dots: list[Dot] = []
        edges: list[tuple[int, int]] = []
        place: dict[object, int] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                continue
            at = place[node] = len(dots)
            edges += sorted({(place[n], at) for n in walk_nodes((node.args, node.kwargs)) if n in place})
            if node.op == "call_function":
                source = next((n for n in node.all_input_nodes if n in place and n.op != "placeholder"), None)
                site = dots[place[source]].site if source is not None and not node.meta.get("sites") else site_of(node)  # a part goes with its whole
                dots.append(Dot(node.name, site, op_name(node.target), describe(node.meta.get("val")), steps.get(node.name, "")))
            else:
                kind = "input" if node.op == "placeholder" else "output"
                dots.append(Dot(node.name, node.name, kind, describe(node.meta["val"]) if kind == "input" else ""))
        return cls(dots, edges)

    def folded(self, readable: int = READABLE) -> tuple[list[tuple[str, list[int]]], list[tuple[int, int]]]:
        """Neighbouring ops of the same module as one box: as deep into the module paths as ``readable`` boxes allow.

        Returns:
            ``(label, positions in dots)`` per box, in graph order, and edges between boxes, always forwards.
        """
        boxes = finer = self._runs(0)
        for depth in range(1, 12):
            finer = self._runs(depth)
            if len(finer) > readable:
                break
            boxes = finer
        if len(boxes) > readable or (len(boxes) < _TOO_FEW <= len(finer)):  # hardly any structure in the names: neighbours together
            size = -(-len(finer) // readable)
            parts = [finer[k : k + size] for k in range(0, len(finer), size)]
            boxes = [(p[0][0] + (" …" if len(p) > 1 else ""), [k for _, members in p for k in members]) for p in parts]
        where = {dot: k for k, (_, members) in enumerate(boxes) for dot in members}
        return boxes, sorted({(where[a], where[b]) for a, b in self.edges if where[a] != where[b]})

    def _runs(self, depth: int) -> list[tuple[str, list[int]]]:
        """Runs of neighbours whose sites agree in their first ``depth`` parts."""
        runs: list[tuple[str, list[int]]] = []
        for k, dot in enumerate(self.dots):
            fixed = dot.op in ("input", "output")
            label = dot.site if fixed else ".".join(dot.site.split(".")[:depth]) or "model"
            if runs and not fixed and runs[-1][0] == label and self.dots[runs[-1][1][-1]].op not in ("input", "output"):
                runs[-1][1].append(k)
            else:
                runs.append((label, [k]))
        return runs
