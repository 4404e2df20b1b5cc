"""One graph of Dynamo's, made ready for capture: what it does is seen by running it, and it becomes a module of our form.

Dynamo hands over everything as an input: parameters, buffers, sizes, numbers. ``Trial`` runs the graph once and notes what
it wrote; ``Split`` makes constants of the weights that it did not write and derives sizes from the tensors they belong to.
"""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.capture.rehearse import clone_sharing
from graphwright.errors import CaptureError

Run = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Input:
    """One input of Dynamo's graph.

    Attributes:
        name: of a parameter or buffer ``layer.0.weight``; of anything else an identifier.
        sizes: of a tensor, each a number or the text of a symbolic expression; None for an integer.
        symbol: of an integer, the symbol that it is.
        weight: a parameter, or a tensor that Dynamo found on a module: it keeps its place from call to call.
    """

    name: str
    sizes: tuple[int | str, ...] | None = None
    symbol: str | None = None
    weight: bool = False


def inputs_of(graph: fx.Graph, examples: Sequence[Any]) -> list[Input]:
    """Read off the graph while Dynamo compiles: it forgets the sources of inputs afterwards."""
    found = []
    for node, example in zip(graph.find_nodes(op="placeholder"), examples, strict=True):
        name, value = _source(node), node.meta.get("example_value")
        if isinstance(value, Tensor):
            sizes = tuple(s if isinstance(s, int) else str(s.node.expr) for s in value.shape)
            weight = isinstance(example, nn.Parameter) or getattr(example, "_dynamo_static_input_type", None) is not None
            found.append(Input(name, sizes, None, weight))
        else:
            found.append(Input(name, None, str(value.node.expr) if isinstance(value, torch.SymInt) else None))
    return found


def _source(node: fx.Node) -> str:
    """``layer.0.weight`` for ``L['self']._modules['layer']._modules['0']._parameters['weight']``."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    text = getattr(source, "name", "")
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", text() if callable(text) else text)
    return ".".join(parts) or re.sub(r"^[lL]_|_$", "", str(node.target))


def unfit(values: Sequence[Any]) -> str | None:
    """None, or why inputs or outputs like these are not for us."""
    for value in values:
        if not isinstance(value, Tensor):
            if not isinstance(value, (int, type(None))):
                return f"an input or output is a {type(value).__name__}"
        elif type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            return f"it works on {type(value).__name__}, a subclass of Tensor"
        elif value.device.type not in ("cpu", "cuda") or value.layout is not torch.strided or value.is_quantized:
            return f"it works on a {value.type().removeprefix('torch.')} on {value.device}: plain tensors on the CPU or a GPU are optimized"
    return None


class Trial:
    """One run of Dynamo's graph on inputs that are fit: what it answered, and what it wrote.

    Attributes:
        outputs: its answer.
        gradients: they were on.
        written: positions of the inputs that it wrote.
        differentiable: a gradient may be asked of what it gave or wrote.
        pure: it may run again without leaving a trace.
    """

    def __init__(self, run: Run, args: tuple[Any, ...]):
        self.args, self.gradients = args, torch.is_grad_enabled()
        tensors = {k: a for k, a in enumerate(args) if isinstance(a, Tensor)}
        # content tells where torch counts no writes: batch norm's to its statistics, those to inference tensors
        before = {k: a._version if isinstance(a, nn.Parameter) and not a.is_inference() else a.clone() for k, a in tensors.items()}
        laid = {k: _layout(a) for k, a in tensors.items()}
        state = torch.get_rng_state()
        self.outputs = run(*args)
        random = not torch.equal(state, torch.get_rng_state())
        self.written = {k for k, a in tensors.items() if not (a._version == before[k] if isinstance(before[k], int) else torch.equal(a, before[k]))}
        self.reshaped = any(_layout(a) != laid[k] for k, a in tensors.items())
        self.switched = torch.is_grad_enabled() != self.gradients
        made = [o for o in self.outputs if isinstance(o, Tensor)]
        self.differentiable = any(t.requires_grad for t in [*made, *(tensors[k] for k in self.written)])
        self.pure = not (random or self.written)

    def refusal(self) -> str | None:
        """None, or what speaks against a program of ours in place of the graph."""
        if self.reshaped or self.switched:
            return "it changes the shape of an input" if self.reshaped else "it leaves gradients switched otherwise"
        return unfit(self.outputs)

    def copies(self, keep: Collection[int] = ()) -> tuple[Any, ...]:
        """The inputs, those at ``keep`` as they are, the other tensors copied: they may be written."""
        free = [k for k, a in enumerate(self.args) if isinstance(a, Tensor) and k not in keep]
        made = dict(zip(free, clone_sharing([self.args[k] for k in free]), strict=True))
        return tuple(made.get(k, a) for k, a in enumerate(self.args))


class Split:
    """Dynamo's graph as a module to capture: weights are constants, sizes follow from tensors, only tensors are returned.

    Args:
        varying: positions of inputs that look like weights but change from call to call.

    Attributes:
        module: takes the tensors at ``free``, gives those outputs that are ``tensors``.
        constants: positions of the inputs that are constants.
        fixed: (position, value) of integers that are no size of an input: they are taken as they are.
        dynamic: by input name, the dimensions that vary.
        rest: computes the other outputs (integers) from the graph's inputs; None where there are none.

    Raises:
        CaptureError: an integer among the outputs depends on the values of tensors.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Input], seen: Trial, varying: Collection[int] = ()):
        args = seen.args
        weights = {k for k, i in enumerate(inputs) if i.weight and not args[k].is_inference()}  # those would not count writes
        self.constants = sorted(weights - seen.written - set(varying))
        self.free = [k for k, a in enumerate(args) if isinstance(a, Tensor) and k not in self.constants]
        self.tensors = [k for k, o in enumerate(seen.outputs) if isinstance(o, Tensor)]
        self.fixed: list[tuple[int, int]] = []
        self.dynamic: dict[str, dict[int, str]] = {}
        self.module = self._module(graph, inputs, args)
        self.rest = self._rest(graph, [k for k in range(len(seen.outputs)) if k not in self.tensors])

    def leaves(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """The module's inputs among the graph's."""
        return tuple(args[k] for k in self.free)

    def _module(self, graph: fx.GraphModule, inputs: Sequence[Input], args: Sequence[Any]) -> fx.GraphModule:
        new, env, held = fx.Graph(), {}, {}
        olds = graph.graph.find_nodes(op="placeholder")
        sizes: dict[str, tuple[fx.Node, int]] = {}
        for k in self.free:
            name = f"in{k}_{re.sub(r'[^0-9a-zA-Z_]', '_', inputs[k].name)}"  # the number keeps one from starting with another
            env[olds[k]] = node = new.placeholder(name)
            for d, size in enumerate(inputs[k].sizes or ()):
                if isinstance(size, str):
                    self.dynamic.setdefault(name, {})[d] = size
                    sizes.setdefault(size, (node, d))
        for k in self.constants:
            name = _free(inputs[k].name, held)
            env[olds[k]], held[name] = new.get_attr(name), args[k]
        for k, old in enumerate(olds):
            if old in env:
                continue
            if inputs[k].symbol in sizes:
                env[old] = new.call_function(torch.ops.aten.sym_size.int, sizes[inputs[k].symbol])
                continue
            env[old] = args[k]
            if any(user.op != "output" for user in old.users):
                self.fixed.append((k, args[k]))
        for node in graph.graph.find_nodes(op="get_attr"):  # constants, and the bodies of higher-order ops
            name = _free(str(node.target), held)
            env[node], held[name] = new.get_attr(name), operator.attrgetter(str(node.target))(graph)
        outputs = new.graph_copy(graph.graph, env)
        new.output(tuple(outputs[k] for k in self.tensors))  # type: ignore[index]
        module = fx.GraphModule(held, new, "DynamoGraph").eval()
        type(module).__call__ = nn.Module.__call__  # fx's own prints every failure, and capture tries what may fail
        return module

    def _rest(self, graph: fx.GraphModule, others: Sequence[int]) -> Run | None:
        if not others:
            return None
        new, env = fx.Graph(), {}
        outputs = new.graph_copy(graph.graph, env)
        new.output(tuple(outputs[k] for k in others))  # type: ignore[index]
        new.eliminate_dead_code()
        left = set(new.nodes)
        if any(env[n] in left and n.op != "placeholder" and isinstance(n.meta.get("example_value"), Tensor) for n in graph.graph.nodes if n in env):
            raise CaptureError("an integer among the outputs depends on the values of tensors")
        return fx.GraphModule(graph, new, "Rest").forward


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A name that no tensor has yet, nor stands above or below one."""
    *path, leaf = name.split(".")
    k, found = 1, name
    while any(t == found or t.startswith(f"{found}.") or found.startswith(f"{t}.") for t in taken):
        k += 1
        found = ".".join([*path, f"{leaf}_{k}"])
    return found


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.untyped_storage().data_ptr()


# -- constants that may be written -----------------------------------------------------------------------------------


class Constants:
    """Tensors taken for constants, and whether they still are what they were.

    A write is seen where torch counts it (``_version``), where the memory is another, and where one of up to four elements
    in the middle has changed: torch counts no writes through ``.data``, and most of those write everywhere.

    Args:
        held: position among the graph's inputs, and the tensor. They are held weakly: the user may drop the model.
        gone: called when one of them is dropped.
    """

    def __init__(self, held: Mapping[int, Tensor], gone: Callable[[], None]):
        self.slots, tensors = list(held), list(held.values())
        self._gone = gone
        self._refs = [weakref.ref(t, self._drop) for t in tensors]
        self._versions = [t._version for t in tensors]
        self._places = [t.data_ptr() for t in tensors]
        self._marks = {k: mark(t) for k, t in held.items()}
        widths: dict[torch.dtype, list[Tensor]] = {}
        for probe in map(_probe, tensors):
            if probe is not None:
                widths.setdefault(probe.dtype, []).append(probe)
        self._probes = [(probes, torch.cat(probes)) for probes in widths.values()]

    def _drop(self, reference: Any) -> None:
        self._probes = []
        self._gone()

    def key(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Which objects they are."""
        return tuple(id(args[k]) for k in self.slots)

    def same(self, args: Sequence[Any]) -> bool:
        """Whether the constants, the same objects as ever, have the same content, as far as the checks see."""
        mine = [args[k] for k in self.slots]
        return ([t._version for t in mine] == self._versions
                and [*map(Tensor.data_ptr, mine)] == self._places
                and all(torch.equal(torch.cat(probes), was) for probes, was in self._probes))  # fmt: skip

    def changed(self, args: Sequence[Any]) -> list[int]:
        """Positions of those that changed."""
        return [k for k in self.slots if mark(args[k]) != self._marks[k]]


def mark(value: Tensor) -> tuple[Any, ...]:
    """Equal for one tensor at two times if it was not written in between, as far as the checks see."""
    probe = _probe(value)
    return id(value), 0 if value.is_inference() else value._version, value.data_ptr(), None if probe is None else tuple(probe.tolist())


def _probe(tensor: Tensor) -> Tensor | None:
    """A view of up to four elements in the middle, as integers; None for an empty tensor and for elements of 16 bytes."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if not tensor.numel() or tensor.itemsize not in kinds:
        return None
    count = min(4, tensor.numel()) if tensor.is_contiguous() else 1
    start = tensor.storage_offset() + ((tensor.numel() - count) // 2 if tensor.is_contiguous() else 0)
    return tensor.detach().as_strided((count,), (1,), start).view(kinds[tensor.itemsize])


__all__ = ["Constants", "Input", "Run", "Split", "Trial", "inputs_of", "mark", "unfit"]
