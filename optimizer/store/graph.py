"""Programs on disk: the graph as JSON, and back, with every op looked up in an allow-list.

A file may name the rows of the op table, other pure ops of ATen and of Graphwright, and the scalar functions on sizes.
Python is never imported or evaluated by a file's word; names that end up in generated code are checked letter by
letter. Metadata is rebuilt, and what the file says of it is checked by running every op without memory (``infer``).
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from graphwright import ops
from graphwright.errors import LoadError, SaveError
from graphwright.ir import SCALAR_FUNCTIONS, Mutation, Program, Signature, normalise, op_name
from graphwright.store.infer import Rehearsal
from graphwright.store.reading import Record, bad, want, want_int, want_strings
from graphwright.store.symbols import Scope, describe_symbols, rebuild_symbols
from graphwright.store.tensors import Place, dtype_name, read_device
from graphwright.store.values import build_value, decode_arg, encode_arg, encode_value
from graphwright.structure import Spec

#: Ops of ATen that read files or print, and so have no place in a file that anybody may have written.
_DENIED = {"aten::from_file", "aten::_print"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_TENSOR_NAME = re.compile(r"[\w\-:#@+/ ]+(\.[\w\-:#@+/ ]+)*\Z")


def permitted(target: Any) -> str | None:
    """None where a file may name this call, else the reason why not."""
    if not isinstance(target, OpOverload):
        return None if target in SCALAR_FUNCTIONS.values() else "it is neither an op nor a scalar function"
    schema = target._schema
    if schema.is_mutable:
        return "it writes into its arguments"
    if ops.row(target) is not None:
        return None
    if target.namespace not in ("aten", "graphwright"):
        return "it is an op of another library and has no row in the op table"
    if schema.name in _DENIED or not torch._C._dispatch_has_kernel(target.name()):
        return "it is no op on tensors"
    return None


def find_call(name: str, where: str) -> Callable[..., Any]:
    """The op or scalar function of that name.

    Raises:
        LoadError: it is unknown here, or no file may name it.
    """
    if name in SCALAR_FUNCTIONS:
        return SCALAR_FUNCTIONS[name]
    parts = name.split(".")
    found = ops.resolve(name) if 2 <= len(parts) <= 3 and all(map(_NAME.match, parts)) else None
    if found is None:
        raise LoadError(
            f"{where}: this installation has no op {name[:80]!r} (torch {torch.__version__})",
            hint="Install the versions that wrote the file; `graphwright inspect` shows them.",
        )
    reason = permitted(found)
    if reason:
        bad(where, f"op {name[:80]!r} is refused: {reason}")
    return found


# -- writing ---------------------------------------------------------------------------------------------------------


def program_to_json(program: Program, describe: Callable[[str, Tensor], dict[str, Any]]) -> dict[str, Any]:
    """JSON of a program; ``describe`` says where a tensor's bytes lie.

    Raises:
        SaveError: a node, a name or an argument that no file may hold.
    """
    tensors: dict[str, Any] = {}
    first_names: dict[int, str] = {}
    for name, tensor in program.tensors().items():
        if not _TENSOR_NAME.match(name):
            raise SaveError(
                f"the parameter name {name!r} has characters that cannot be saved", hint="Rename it in the model."
            )
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        tensors[name] = {
            "at": describe(name, tensor),
            "kind": kind,
            "grad": tensor.requires_grad,
            "same": first_names.get(id(tensor)),
        }
        first_names.setdefault(id(tensor), name)
    signature = program.signature
    return {
        "symbols": describe_symbols(program),
        "inputs": None if signature.inputs is None else signature.inputs.to_json(),
        "outputs": None if signature.outputs is None else signature.outputs.to_json(),
        "mutations": [[m.buffer, m.input] for m in signature.mutations],
        "training": program.training,
        "provenance": {n: list(v) for n, v in program.provenance.items()},
        "tensors": tensors,
        "nodes": [_node_to_json(n) for n in program.graph.nodes if n.op != "output"],
        "results": encode_arg(tuple(program.output.args[0]), "the output")["tuple"],
    }


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"name": node.name, "op": "input", "value": encode_value(node.meta["val"], node.name, strict=True)}
    if node.op == "get_attr":
        return {"name": node.name, "op": "tensor", "tensor": str(node.target)}
    where, target = f"node {node.name}", op_name(node.target)
    reason = "it is no call" if node.op != "call_function" else permitted(node.target)
    if reason is None and isinstance(node.target, OpOverload) and ops.resolve(target) is not node.target:
        reason = "its name stands for another op"
    if reason:
        raise SaveError(
            f"{where} ({target}) cannot be saved: {reason}",
            where=", ".join(node.meta.get("sites") or ()) or None,
            hint="A file holds PyTorch's and Graphwright's ops: let the model compute this with torch's own functions "
            "(many libraries have a setting for it, such as an 'eager' implementation), or describe the op with gw.register_op; then "
            "optimize it again.",
        )
    trace = node.meta.get("trace")
    return {
        "name": node.name,
        "op": "call",
        "target": target,
        "args": [encode_arg(a, where) for a in node.args],
        "kwargs": {k: encode_arg(v, where) for k, v in node.kwargs.items()},
        "value": encode_value(node.meta["val"], where),
        "sites": list(node.meta.get("sites") or ()),
        "trace": None if trace is None else encode_arg(trace, where),
    }


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Draft:
    """A program that has been read and checked, all but the contents of its tensors."""

    graph: fx.Graph
    signature: Signature
    scope: Scope
    tensors: dict[str, tuple[Place, bool, bool, str | None]]
    provenance: dict[str, tuple[str, ...]]
    training: bool

    @property
    def settled(self) -> bool:
        """What the file says of values was checked, and follows from the file, this torch and this Graphwright alone."""
        return not self.scope.late.made and all(_ours(n.target) for n in self.graph.nodes if n.op == "call_function")

    def finish(self, load: Callable[[Place], Tensor]) -> Program:
        """The program; ``load`` gives a tensor's contents."""
        made: dict[str, Tensor] = {}
        root = nn.Module()
        for name, (place, parameter, grad, same) in self.tensors.items():
            if same is not None:
                made[name] = made[same]
            else:
                tensor = load(place)
                made[name] = nn.Parameter(tensor, requires_grad=grad) if parameter else tensor.requires_grad_(grad)
            _register(root, name, made[name])
        graph_module = fx.GraphModule(root, self.graph)
        read = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        for name in made.keys() - read:
            _register(graph_module, name, made[name])
        program = Program(graph_module, self.signature, self.scope.finish(), self.provenance)
        return program.train(self.training)


def _ours(target: Any) -> bool:
    """Whether a call is one of torch's or of Graphwright's own, not one that another package defines."""
    if not isinstance(target, OpOverload):
        return True
    row = ops.row(target)
    if target.namespace == "graphwright":
        return row is not None and row.reference.__module__.startswith(f"{ops.__name__}.")
    return target.namespace == "aten"


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def read_program(data: Any, run_sizes: Mapping[str, int], where: str, trusted: bool = False) -> Draft:
    """Check a program's JSON and rebuild its graph on fake tensors, or outlines of them; no tensor data are read.

    Args:
        run_sizes: bytes of every run of tensor data in the file.
        trusted: this JSON was read before, and what it says of values was right: they are not inferred again.

    Raises:
        LoadError: what does not fit, and where.
    """
    record = Record(data, "symbols inputs outputs mutations training provenance tensors nodes results", where)
    scope = rebuild_symbols(record.raw("symbols"), f"{where}.symbols")
    tensors = {n: _read_tensor(n, v, run_sizes, where) for n, v in record.get("tensors", dict).items()}
    for name, (place, parameter, _, same) in tensors.items():
        if same is not None and (
            same == name
            or same not in tensors
            or tensors[same][0] != place
            or tensors[same][1] != parameter
            or tensors[same][3] is not None
            or list(tensors).index(same) > list(tensors).index(name)
        ):
            bad(f"{where}, tensor {name!r}", f"it cannot be the same as {same[:80]!r}")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    rehearsal = Rehearsal(scope, trusted)
    for k, entry in enumerate(record.get("nodes", list)):
        _read_node(entry, graph, nodes, tensors, rehearsal, f"{where}, node {k}")
    results = tuple(decode_arg(r, nodes, f"{where}, output {k}") for k, r in enumerate(record.get("results", list)))
    graph.output(results)
    if scope.late.made:
        scope.late.settle(graph.nodes)
    signature = Signature(
        *(_read_spec(record.raw(k)) for k in ("inputs", "outputs")),
        _read_mutations(record.get("mutations", list), tensors, nodes, results, where),
        scope.spans,
    )
    if signature.inputs is not None and signature.inputs.count != sum(n.op == "placeholder" for n in graph.nodes):
        bad(
            where,
            f"{signature.inputs.count} tensors in the structure of the inputs, but the graph reads another number",
        )
    if signature.outputs is not None and signature.outputs.count != len(results) - len(signature.mutations):
        bad(
            where,
            f"{signature.outputs.count} tensors in the structure of the outputs, but the graph gives another number",
        )
    origins = record.get("provenance", dict)
    provenance = {n: want_strings(v, f"{where}.provenance") for n, v in origins.items()}
    return Draft(graph, signature, scope, tensors, provenance, record.get("training", bool))


def _read_spec(data: Any) -> Spec | None:
    return None if data is None else Spec.from_json(data)


def _read_tensor(name: str, data: Any, sizes: Mapping[str, int], where: str) -> tuple[Place, bool, bool, str | None]:
    where = f"{where}, tensor {name[:80]!r}"
    if not _TENSOR_NAME.match(name):
        bad(where, "an unusable name")
    record = Record(data, "at kind grad same", where)
    place = Place.read(record.raw("at"), sizes, where)
    read_device(place.device, where)
    kind, same, grad = record.get("kind", str), record.raw("same"), record.get("grad", bool)
    if kind not in ("parameter", "buffer"):
        bad(where, f"unknown kind {kind[:40]!r}")
    if grad and not (place.dtype.is_floating_point or place.dtype.is_complex):
        bad(where, f"{place.dtype} has no gradients")
    return place, kind == "parameter", grad, same if same is None else want(same, str, where)


def _read_node(
    entry: Any, graph: fx.Graph, nodes: dict[str, fx.Node], tensors: Mapping[str, Any], rehearsal: Rehearsal, where: str
) -> None:
    kind = want(entry, dict, where).get("op")
    shapes = {
        "input": "name op value",
        "tensor": "name op tensor",
        "call": "name op target args kwargs value sites trace",
    }
    if not isinstance(kind, str) or kind not in shapes:
        bad(where, f"unknown kind {str(kind)[:40]!r}")
    record = Record(entry, shapes[kind], where)
    name = record.get("name", str)
    if not _NAME.match(name) or keyword.iskeyword(name) or name in nodes or len(name) > 400:
        bad(where, f"an unusable name {name[:60]!r}")
    if kind == "input":
        node = graph.create_node("placeholder", name, (), {}, name=name)
        rehearsal.give(node, build_value(record.raw("value"), rehearsal.scope, where))
    elif kind == "tensor":
        target = record.get("tensor", str)
        if target not in tensors:
            bad(where, f"its tensor {target[:80]!r} is not in the file")
        node = graph.create_node("get_attr", target, (), {}, name=name)
        place = tensors[target][0]
        rehearsal.give(node, rehearsal.scope.fake(place.shape, place.stride, dtype_name(place.dtype), place.device))
    else:
        node = _read_call(record, name, graph, nodes, rehearsal)
    if node.name != name:
        bad(where, f"an unusable name {name[:60]!r}")
    nodes[name] = node


def _read_call(
    record: Record, name: str, graph: fx.Graph, nodes: Mapping[str, fx.Node], rehearsal: Rehearsal
) -> fx.Node:
    where = f"{record.where} ({name})"
    target = find_call(record.get("target", str), where)
    args = tuple(decode_arg(a, nodes, where) for a in record.get("args", list))
    kwargs = {k: decode_arg(v, nodes, where) for k, v in record.get("kwargs", dict).items()}
    if isinstance(target, OpOverload) and normalise(target, args, kwargs) != (args, kwargs):
        bad(where, "its arguments are not complete")
    if not isinstance(target, OpOverload) and kwargs:
        bad(where, "a scalar function takes no keyword arguments")
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    rehearsal.call(node, record.raw("value"), where)
    node.meta["sites"] = record.strings("sites")
    if record.raw("trace") is not None:
        node.meta["trace"] = decode_arg(record.raw("trace"), {}, where)
    return node


def _read_mutations(
    items: list[Any], tensors: Mapping[str, Any], nodes: Mapping[str, fx.Node], results: tuple[Any, ...], where: str
) -> tuple[Mutation, ...]:
    inputs = sum(n.op == "placeholder" for n in nodes.values())
    found = []
    for item in items:
        pair = want(item, list, f"{where}.mutations")
        if len(pair) != 2 or (pair[0] is None) == (pair[1] is None):
            bad(f"{where}.mutations", "a mutation is [buffer, null] or [null, input]")
        if pair[0] is not None and want(pair[0], str, f"{where}.mutations") not in tensors:
            bad(f"{where}.mutations", f"there is no buffer {pair[0][:80]!r}")
        found.append(
            Mutation(pair[0], None if pair[1] is None else want_int(pair[1], f"{where}.mutations", 0, inputs - 1))
        )
    if len(found) > len(results):
        bad(f"{where}.mutations", "more of them than the graph has outputs")
    return tuple(found)
