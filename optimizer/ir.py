"""The IR: ``Program`` wraps one ``torch.fx.GraphModule`` whose invariants ``Program.verify`` checks.

The graph has one placeholder per input tensor, ``get_attr`` nodes for parameters, buffers and constants (under the
model's own qualified names), ``call_function`` nodes whose targets are ``OpOverload`` s or scalar functions on
symbolic sizes, and one output: a flat tuple of the user's outputs followed by the new values of mutated buffers and
inputs. Every node carries ``meta["val"]`` (FakeTensor, SymInt or number); every ``call_function`` node carries
``meta["sites"]``, a tuple of site names.
"""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from graphwright import invariants, source
from graphwright.errors import InternalError
from graphwright.inference import Inference, fake_of
from graphwright.nodes import (
    SCALAR_FUNCTIONS,
    arg,
    args_by_name,
    describe,
    line,
    normalise,
    op_name,
    set_arg,
    site_of,
    sites_of,
    walk_nodes,
)
from graphwright.outline import Late
from graphwright.snapshot import Snapshot

if TYPE_CHECKING:
    from graphwright.difference import Difference

__all__ = [
    "SCALAR_FUNCTIONS", "Mutation", "Program", "Signature", "Span", "arg", "args_by_name", "describe", "normalise", "op_name",
    "set_arg", "site_of", "sites_of", "walk_nodes",
]  # fmt: skip


_GIVEN = ("placeholder", "get_attr")


@dataclass(frozen=True)
class Mutation:
    """One extra output: the new value of a buffer (by name) or of an input (by its position among the leaves)."""

    buffer: str | None = None
    input: int | None = None


@dataclass(frozen=True)
class Span:
    """What a symbolic size may be: ``low <= size <= high`` and ``size % multiple == 0``."""

    low: int
    high: int | None
    multiple: int = 1


@dataclass(eq=False)
class Signature:
    """What stands round the graph: structures of inputs and outputs, mutations, and dynamic sizes.

    Attributes:
        inputs, outputs: ``graphwright.structure.Spec``.
        mutations: extra outputs, in the order in which they follow the user's.
        symbols: every free symbol in the placeholders' sizes, by name (``"s27"``), and what it may be.
    """

    inputs: Any = None
    outputs: Any = None
    mutations: tuple[Mutation, ...] = ()
    symbols: dict[str, Span] = field(default_factory=dict)


class Program(nn.Module):
    """A captured model; an ordinary ``nn.Module`` over flat tensors.

    Args:
        graph_module: the graph and, under their qualified names, its parameters, buffers and constants.
        signature: see ``Signature``.
        fake_mode: the FakeTensorMode that made ``meta["val"]``, or a ``Late`` one whose outlines stand there.
        provenance: for each parameter that a pass made, the names of the original ones it came from.
    """

    def __init__(self, graph_module: fx.GraphModule, signature: Signature, fake_mode: Any,
                 provenance: Mapping[str, tuple[str, ...]] | None = None):  # fmt: skip
        super().__init__()
        self.graph_module = graph_module
        self.signature = signature
        self._late = fake_mode if isinstance(fake_mode, Late) else None
        self._fake_mode = None if self._late else fake_mode
        self._inference = Inference()
        self._first: fx.Node | None = None
        self.provenance: dict[str, tuple[str, ...]] = dict(provenance or {})
        #: flat example inputs, and batches of flat calibration inputs, for passes and checks; never saved
        self.example: tuple[torch.Tensor, ...] | None = None
        self.calibration: Sequence[tuple[torch.Tensor, ...]] = ()
        #: the report of the result that runs it, for its picture; never copied or saved
        self.measured: Any = None

    # -- running -----------------------------------------------------------------------------------------------

    def forward(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the graph op by op: flat input tensors in, the user's output tensors out; mutations are applied."""
        outs = self.graph_module(*leaves)
        count = len(outs) - len(self.signature.mutations)
        for mutation, value in zip(self.signature.mutations, outs[count:], strict=True):
            with torch.no_grad():
                target = leaves[mutation.input] if mutation.buffer is None else self.tensor(mutation.buffer)
                target.copy_(value)
        return tuple(outs[:count])

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def fake_mode(self) -> Any:
        """The mode of every ``meta["val"]``; a program that was loaded gets its FakeTensors when this is first asked for."""
        return self.settled()._fake_mode

    def settled(self) -> Program:
        """This program, with FakeTensors where loading left outlines of them."""
        if self._late is not None:
            self._late.settle(self.graph.nodes)
            self._late, self._fake_mode = None, self._late.mode
        return self

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def nodes(self) -> list[fx.Node]:
        """The ops, in order: placeholders, constants and the output are left out."""
        return [n for n in self.graph.nodes if n.op == "call_function"]

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    def tensor(self, name: str) -> torch.Tensor:
        """The parameter, buffer or constant of that qualified name."""
        value = operator.attrgetter(name)(self.graph_module)
        if not isinstance(value, torch.Tensor):
            raise InternalError(f"{name!r} is no tensor but {type(value).__name__}")
        return value

    def constant(self, node: Any) -> torch.Tensor | None:
        """The tensor behind a ``get_attr`` node that no mutation writes; None for anything else."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        if any(m.buffer == node.target for m in self.signature.mutations):
            return None
        return self.tensor(str(node.target))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor the graph reads or writes, by name."""
        held = self.held()
        names = [str(n.target) for n in self.graph.nodes if n.op == "get_attr"]
        names += [m.buffer for m in self.signature.mutations if m.buffer is not None]
        return {name: held[name] if name in held else self.tensor(name) for name in names}

    def held(self) -> dict[str, torch.Tensor]:
        """Every parameter, buffer and constant by name, those that no node reads included."""
        found: dict[str, torch.Tensor] = {}
        todo: list[tuple[str, nn.Module]] = [("", self.graph_module)]
        while todo:
            prefix, module = todo.pop()
            for store in (module._parameters, module._buffers):
                found.update((prefix + leaf, tensor) for leaf, tensor in store.items() if tensor is not None)
            todo += [(f"{prefix}{leaf}.", child) for leaf, child in module._modules.items() if child is not None]
        return found

    def size_bytes(self) -> int:
        """Bytes of all tensors of the program, shared storage counted once."""
        seen = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in self.tensors().values()}
        return sum(nbytes for _, nbytes in seen)

    def sites(self) -> dict[str, list[fx.Node]]:
        """Nodes by site, in graph order."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            for site in sites_of(node):
                found.setdefault(site, []).append(node)
        return found

    # -- writing -----------------------------------------------------------------------------------------------

    def add_tensor(self, name: str, tensor: torch.Tensor, *, origin: Iterable[str] = (),
                   trainable: bool = False) -> fx.Node:  # fmt: skip
        """Store a tensor under a name derived from ``name`` and return its ``get_attr`` node.

        Args:
            origin: names of the tensors that it was made from; followed back to the original ones.
            trainable: keep it as a parameter rather than a buffer.
        """
        name = self._free_name(name)
        owner = self.graph_module
        *path, leaf = name.split(".")
        for part in path:
            if not isinstance(getattr(owner, part, None), nn.Module):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if trainable and tensor.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(tensor.detach()))
        else:
            owner.register_buffer(leaf, tensor.detach())
        sources = [s for o in origin for s in self.provenance.get(o, (o,))]
        if sources:
            self.provenance[name] = tuple(dict.fromkeys(sources))
        return self._get_attr(name)

    def _free_name(self, name: str) -> str:
        *path, leaf = name.split(".")
        owner: Any = self.graph_module
        for k, part in enumerate(path):
            while hasattr(owner, path[k]) and not isinstance(getattr(owner, path[k]), nn.Module):
                path[k] = part = f"{part}_"  # a tensor, or a method of nn.Module, stands there
            owner = getattr(owner, path[k], None)
        candidate, k = leaf, 1
        while owner is not None and hasattr(owner, candidate):
            k += 1
            candidate = f"{leaf}_{k}"
        return ".".join([*path, candidate])

    def _get_attr(self, name: str) -> fx.Node:
        with self.graph.inserting_before(self._first_op()):
            node = self.graph.create_node("get_attr", name, (), {})
        node.meta["val"] = self.fake(self.tensor(name))
        return node

    def _first_op(self) -> fx.Node:
        """What the inputs and constants stand before; found anew only where a node was put among them."""
        first = self._first
        known = first is not None and not first._erased and first.graph is self.graph and first.prev.op in _GIVEN
        if not known:
            first = next(n for n in self.graph.nodes if n.op not in _GIVEN)
            self._first = first
        return first

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` as a FakeTensor of this program's mode, all sizes fixed."""
        return fake_of(tensor, self.fake_mode)

    def call(self, target: OpOverload, *args: Any, sites: Iterable[str] = (), like: fx.Node | None = None,
             **kwargs: Any) -> fx.Node:  # fmt: skip
        """Insert a normalised, inferred node at the graph's current insertion point.

        Args:
            sites: the sites it stands for.
            like: a node whose sites and source line it takes.
        """
        args, kwargs = normalise(target, args, kwargs)
        node = self.graph.call_function(target, args, kwargs)
        if node.prev.op in _GIVEN:
            self._first = None
        if like is not None:
            node.meta["trace"] = like.meta.get("trace")
        node.meta["sites"] = tuple(dict.fromkeys([*sites, *(sites_of(like) if like is not None else ())]))
        node.meta["val"] = self.infer(node)
        node.meta["checked"] = invariants.evidence(node)
        return node

    def infer(self, node: fx.Node) -> Any:
        """What ``node`` gives, as fake tensors and symbolic sizes, from its arguments' ``meta["val"]``."""
        return self.infer_call(node.target, node.args, node.kwargs)  # type: ignore[arg-type]

    def infer_call(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a call on these nodes and numbers would give; raises what the op raises where it does not take them."""
        mode = self.fake_mode
        args, kwargs = fx.node.map_arg((args, dict(kwargs)), lambda n: n.meta["val"])
        return self._inference(mode, target, args, kwargs)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of ``old`` read ``new``, which takes over its sites, and erase ``old``."""
        if new.op == "call_function":
            new.meta["sites"] = tuple(dict.fromkeys([*sites_of(new), *sites_of(old)]))
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def prune(self, nodes: Iterable[fx.Node]) -> None:
        """Erase those of ``nodes`` that nothing reads, and what nothing but them read; tensors stay until ``tidy``."""
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if not node._erased and not node.users and node.op in ("call_function", "get_attr"):
                todo += node.all_input_nodes
                self.graph.erase_node(node)

    def tidy(self) -> bool:
        """Erase nodes that nothing reads and tensors that no node reads; True when anything went."""
        gone = False
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op in ("call_function", "get_attr"):
                self.graph.erase_node(node)
                gone = True
        wanted = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        wanted |= {m.buffer for m in self.signature.mutations if m.buffer}
        for module_name, module in list(self.graph_module.named_modules()):
            prefix = f"{module_name}." if module_name else ""
            for store in (module._parameters, module._buffers):
                for leaf in [k for k in store if prefix + k not in wanted]:
                    del store[leaf]
                    gone = True
        if gone:
            self._drop_empty(self.graph_module)
        return gone

    def _drop_empty(self, module: nn.Module) -> bool:
        for name, child in list(module._modules.items()):
            if child is not None and self._drop_empty(child):
                del module._modules[name]
        return not (module._modules or module._parameters or module._buffers)

    def copy(self) -> Program:
        """A program of its own graph; tensors are shared, since passes never write into one."""
        return Snapshot.of(self.settled()).restore()

    def like(self, graph_module: fx.GraphModule, provenance: Mapping[str, tuple[str, ...]]) -> Program:
        """A program of another graph with this one's signature, modes and examples."""
        twin = Program(graph_module, copy.copy(self.signature), self.fake_mode, provenance)
        twin._inference = self._inference
        twin.example, twin.calibration = self.example, self.calibration
        twin.training = self.training
        return twin

    def recompile(self) -> None:
        self.graph_module.recompile()

    @contextmanager
    def preserved(self, leaves: Sequence[torch.Tensor] = ()) -> Iterator[None]:
        """Run inside without leaving a trace: mutated buffers, and the mutated ones of ``leaves``, come back."""
        held = [self.tensor(m.buffer) if m.buffer is not None else leaves[m.input] for m in self.signature.mutations
                if m.buffer is not None or (m.input is not None and m.input < len(leaves))]  # fmt: skip
        kept = [(t, t.detach().clone()) for t in held]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in kept:
                    tensor.copy_(value)

    # -- checking ----------------------------------------------------------------------------------------------

    def verify(self, nodes: Iterable[fx.Node] | None = None) -> None:
        """Check every invariant; with ``nodes``, each node's place in the graph, and everything else at these alone.

        Raises:
            InternalError: which node breaks which invariant, with the program's text.
        """
        invariants.verify(self, nodes)

    # -- printing ----------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return self.code()

    def code(self) -> str:
        """Python that runs: ``exec(program.code(), names)``, then ``names["forward"](program.tensors(), *leaves)``; see ``source.code``."""
        return source.code(self)

    def text(self) -> str:
        """The program, a line per node: name, shape, op, arguments, site. Golden tests compare this text."""
        return "\n".join(line(n.name, n.op, n.target, n.args, n.kwargs, n.meta) for n in self.graph.nodes)

    def diff(self, other: Program) -> Difference:
        """What differs in ``other``: ops added, removed and changed, by site, whatever their nodes are called; print it.

        ``fast.captured.diff(fast.program)`` shows what optimizing did to a model.
        """
        from graphwright.difference import diff

        return diff(self.settled(), other.settled())

    def to_svg(self, path: str | os.PathLike[str] | None = None, *, every_op: bool | None = None) -> str:
        """The graph as an SVG picture, also written to ``path``: coloured by time where a result runs it, repeated blocks drawn once.

        ``every_op``: a box per kernel, its ops in it, or, False, per module; by default whichever is legible. ``SaveError`` where
        the file cannot be written.
        """
        from graphwright.drawing.svg import of_program

        return of_program(self.settled(), self.measured, every_op, path)
