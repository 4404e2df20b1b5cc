"""From what torch.export traced to a ``Program``: one functional, normalised graph of our own.

The traced graph is interpreted node by node: regions under ``no_grad`` and ``autocast`` are inlined, ops that write
become functional (``functional``), ops that only guard or detach are dropped, arguments are completed, and every node
gets its fake value, site and source line.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.export.graph_signature import InputKind, OutputKind

from graphwright import ir
from graphwright.capture import functional
from graphwright.capture.functional import Base, Ref, Refused, ViewStep
from graphwright.capture.sites import WRAPPED, Origin, name_sites, origin
from graphwright.capture.weights import Weights
from graphwright.errors import CaptureError
from graphwright.inference import fake_of

aten = torch.ops.aten

#: Ops that state facts about sizes or values and compute nothing.
_GUARDS = ("_assert", "sym_constrain", "_functional_assert", "_functional_sym", "_record_function")
_RESHAPES = (aten.view.default, aten._unsafe_view.default)
_SAME = ("detach", "detach_", "alias", "lift", "lift_fresh")


@dataclass(eq=False)
class Several:
    """The result of an op with several tensor outputs."""

    node: fx.Node
    parts: list[Any]


class Builder:
    """Interprets one ``ExportedProgram``; ``build`` gives the program.

    Args:
        exported: the traced wrapper.
        model: the user's model.
        names: a name for each input leaf.
        prefix: what stands before every site.
        storage: the copies of the model's storages made so far, by address; programs of one model may share them.
    """

    def __init__(self, exported: Any, model: nn.Module, names: Sequence[str], prefix: str = "",
                 storage: dict[int, torch.UntypedStorage] | None = None):  # fmt: skip
        self.exported, self.model, self.names, self.prefix = exported, model, names, prefix
        self.weights = Weights(model, exported, {} if storage is None else storage)
        self.graph = fx.Graph()
        self.notes: list[str] = []
        self.made: list[tuple[fx.Node, Origin]] = []
        self.where = Origin()
        self.cast: torch.dtype | None = None
        self.bases: list[Base] = []
        self.stands_for: fx.Node | None = None  # the traced node that the next one emitted is
        self.calm = False  # nothing is written that anyone else can see: traced fake values hold
        self.home: dict[Base, fx.Node] = {}
        self.differentiable: set[fx.Node] = set()
        held = [n.meta["val"] for n in exported.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        self.fake_mode = next((v.fake_mode for v in held), None) or torch._subclasses.FakeTensorMode()

    # -- the whole -----------------------------------------------------------------------------------------------

    def build(self, signature: ir.Signature) -> ir.Program:
        """The program.

        Raises:
            CaptureError: an op writes in a way that cannot be made functional.
        """
        env: dict[fx.Node, Any] = {}
        self.calm = functional.calm(self.exported.graph_module)
        self._inputs(env)
        result = self._run(self.exported.graph_module, env)
        outputs: list[Any] = []
        for spec, value in zip(self.exported.graph_signature.output_specs, result, strict=True):
            if spec.kind == OutputKind.USER_OUTPUT:
                outputs.append(value)
            elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                target = self._target(spec)
                functional.write(Ref(target, (), target.node, target.version), self._read(value), self.emit)
        flat = [self._read(v) for v in outputs]
        mutations = []
        for base in self.bases:
            if base.version and base.node is not self.home[base]:
                flat.append(base.node)
                mutations.append(ir.Mutation(buffer=base.buffer, input=base.input))
        self.graph.output(tuple(flat))
        module = fx.GraphModule(self.weights.root, self.graph)
        program = ir.Program(module, replace(signature, mutations=tuple(mutations)), self.fake_mode)
        program.train(self.model.training)
        program.tidy()
        kept = set(program.graph.nodes)
        name_sites(self.model, [(n, o) for n, o in self.made if n in kept], self.prefix)
        program.recompile()
        return program

    def _inputs(self, env: dict[fx.Node, Any]) -> None:
        specs = self.exported.graph_signature.input_specs
        olds = [n for n in self.exported.graph.nodes if n.op == "placeholder"]
        given = [old for spec, old in zip(specs, olds, strict=True) if spec.kind == InputKind.USER_INPUT]
        for k, old in enumerate(given):
            node = self.graph.placeholder(self.names[k])
            node.meta["val"] = self._concrete(old.meta["val"])
            env[old] = self._fresh(node, input=k)
            if old.meta["val"].is_floating_point():
                self.differentiable.add(node)
        refs: dict[str, Ref] = {}
        for spec, old in zip(specs, olds, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                continue
            name, tensor = self.weights.take(str(spec.target))
            if name not in refs:
                node = self.graph.get_attr(name)
                node.meta["val"] = fake_of(tensor, self.fake_mode)
                if tensor.requires_grad:
                    self.differentiable.add(node)
                refs[name] = self._fresh(node, buffer=name)
            env[old] = refs[name]

    def _concrete(self, value: torch.Tensor) -> torch.Tensor:
        """The fake of an input; a symbolic size that the trace found to be a constant becomes a plain number."""
        said = [*value.shape, *(value.stride() if value.layout is torch.strided else ())]
        plain = [functional.plain_number(s) for s in said]
        if all(a is b for a, b in zip(said, plain, strict=True)):
            return value
        with self.fake_mode:
            return torch.empty_strided(plain[: value.ndim], plain[value.ndim :], dtype=value.dtype, device=value.device)

    def _fresh(self, node: fx.Node, **source: Any) -> Ref:
        base = Base(node, **source)
        if source:
            self.bases.append(base)
            self.home[base] = node
        return Ref(base, (), node, 0)

    def _target(self, spec: Any) -> Base:
        name = str(spec.target).removeprefix(f"{WRAPPED}.")
        return next(b for b in self.bases if b.buffer == name or (b.input is not None and self.names[b.input] == name))

    # -- interpreting --------------------------------------------------------------------------------------------

    def _run(self, module: fx.GraphModule, env: dict[fx.Node, Any]) -> Sequence[Any]:
        for old in module.graph.nodes:
            if old.op == "placeholder":
                continue
            if old.op == "output":
                return fx.node.map_arg(old.args[0], lambda n: env[n])
            if old.op == "get_attr":
                env[old] = operator.attrgetter(old.target)(module)
                continue
            self.where = origin(old)
            args, kwargs = fx.node.map_arg((old.args, old.kwargs), lambda n: env[n])
            env[old] = self._call(old, args, dict(kwargs))
        return ()

    def _call(self, old: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = old.target
        if target is operator.getitem and isinstance(args[0], (Several, list, tuple)):
            return args[0].parts[args[1]] if isinstance(args[0], Several) else args[0][args[1]]
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._region(old, target, args)
        if not isinstance(target, OpOverload):
            if target not in ir.SCALAR_FUNCTIONS.values():
                raise self._refuse(f"{getattr(target, '__name__', target)} is not an op")
            return self._scalar(target, args, kwargs)
        name = target._schema.name.partition("::")[2]
        if name.startswith(_GUARDS):
            return None
        if name in _SAME and (name.startswith("lift") or not self._carries(args[0])):
            return args[0]
        if name == "lift_fresh_copy":
            return self._fresh(self._read(args[0]))
        if target._schema.is_mutable:
            try:
                return self._mutate(old, target, name, args, kwargs)
            except Refused as reason:
                raise self._refuse(str(reason)) from None
        if target in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
            return self._squeeze(old, target, args)
        if target is aten.batch_norm.default and len(args) > 5 and args[5] and isinstance(args[3], Ref):
            return self._batch_statistics(old, args)
        return self._op(old, target, args, kwargs)

    def _squeeze(self, old: fx.Node, target: OpOverload, args: tuple[Any, ...]) -> Any:
        """Squeeze the dimensions that are 1 for certain, whatever the sizes that vary turn out to be in a call."""
        shape = self._read(args[0]).meta["val"].shape
        if all(isinstance(s, int) for s in shape):
            return self._op(old, target, args, {})
        asked = args[1] if len(args) > 1 else range(len(shape))
        asked = [asked] if isinstance(asked, int) else asked
        dims = [d % len(shape) for d in asked if isinstance(shape[d], int) and shape[d] == 1]
        return self._op(old, aten.squeeze.dims, (args[0], dims), {})

    def _batch_statistics(self, old: fx.Node, args: tuple[Any, ...]) -> Any:
        """Batch norm in train mode: the op itself would write the running statistics; here they are written apart."""
        x, mean, var, momentum = args[0], args[3], args[4], args[6]
        result = self._op(old, aten.batch_norm.default, (*args[:3], None, None, *args[5:]), {})
        dims = [d for d in range(self._read(x).meta["val"].ndim) if d != 1]
        for held, now in ((mean, self.emit(aten.mean.dim, self._read(x), dims)),
                          (var, self.emit(aten.var.correction, self._read(x), dims, correction=1))):  # fmt: skip
            was = self._read(held)
            now = self._like(now, was.meta["val"])
            change = self.emit(aten.mul.Tensor, self.emit(aten.sub.Tensor, now, was), momentum)
            functional.write(held, self.emit(aten.add.Tensor, was, change), self.emit)
        return result

    def _refuse(self, what: str) -> CaptureError:
        return CaptureError(what, where=self.where.trace or self.where.path or None)

    def _scalar(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(isinstance(a, fx.Node) for a in args):
            return target(*args, **kwargs)
        return self.emit(target, *args, **kwargs)

    def _region(self, old: fx.Node, target: Any, args: tuple[Any, ...]) -> Any:
        """Inline a region under ``set_grad_enabled`` or ``autocast``."""
        name = target._name
        if name == "wrap_with_set_grad_enabled":
            enabled, module, inputs = args[0], args[1], args[2:]
            result = self._inline(module, inputs)
            return result if enabled else [self._stop(r) for r in result]
        if name == "wrap_with_autocast":
            dtype, enabled, module, inputs = args[1], args[2], args[4], args[5:]
            outer, self.cast = self.cast, dtype if enabled else None
            try:
                return self._inline(module, inputs)
            finally:
                self.cast = outer
        raise self._refuse(f"the control-flow operator {name} has no place in a program yet")

    def _inline(self, module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
        names = [n for n in module.graph.nodes if n.op == "placeholder"]
        return list(self._run(module, dict(zip(names, inputs, strict=True))))

    def _stop(self, value: Any) -> Any:
        """Keep a gradient from flowing where the model computes without one."""
        if isinstance(value, Ref) and self._carries(value):
            step = ViewStep(aten.detach.default, (None,), {}, identity=True)
            return Ref(value.base, (*value.chain, step), self.emit(aten.detach.default, self._read(value)), value.version)
        return value

    def _carries(self, value: Any) -> bool:
        """Whether a gradient may flow through a value."""
        return isinstance(value, Ref) and self._read(value) in self.differentiable

    # -- values --------------------------------------------------------------------------------------------------

    def _read(self, value: Any) -> Any:
        """A value as an argument of a new node."""
        if isinstance(value, Ref):
            return functional.read(value, self.emit)
        if isinstance(value, Several):
            return [self._read(p) for p in value.parts]
        if isinstance(value, (list, tuple)):
            return tuple(map(self._read, value)) if isinstance(value, tuple) else list(map(self._read, value))
        if isinstance(value, dict):
            return {k: self._read(v) for k, v in value.items()}
        return value

    def _op(self, old: fx.Node, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A functional op: new node, and for each tensor it gives whose memory it shares."""
        refs = [r for r in _walk((args, kwargs)) if isinstance(r, Ref)]
        args, kwargs = self._read(args), self._read(kwargs)
        self.stands_for = old
        node = self.emit(target, *args, **kwargs)
        value = node.meta["val"]
        if type(value) in (int, float, bool):
            return value  # a size that turned out to be a constant
        if isinstance(value, torch.Tensor):
            return self._alias(node, node, None, value, refs)
        if isinstance(value, (list, tuple)):
            parts = []
            for k, v in enumerate(value):
                item = self.emit(operator.getitem, node, k)
                parts.append(self._alias(node, item, k, v, refs) if isinstance(v, torch.Tensor) else item)
            return Several(node, parts)
        return node

    def _alias(self, op: fx.Node, node: fx.Node, index: int | None, value: torch.Tensor, refs: list[Ref]) -> Ref:
        """The ref of one output: a view of the argument whose memory it shares, else fresh memory."""
        place = value.untyped_storage()._cdata
        for ref in refs:
            under = ref.node.meta["val"]
            if not isinstance(under, torch.Tensor) or under.untyped_storage()._cdata != place:
                continue
            if not (op.args and op.args[0] is ref.node):
                break  # shares memory with an argument that is not its first (or one in a list): no view we can replay
            same = functional.layout(under) == functional.layout(value)
            step = ViewStep(op.target, op.args, dict(op.kwargs), index, same)  # type: ignore[arg-type]
            return Ref(ref.base, (*ref.chain, step), node, ref.version)
        return self._fresh(node)

    def _mutate(self, old: fx.Node, target: OpOverload, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op that writes: its functional twin, and the new value for everyone who shares the memory."""
        if name in functional.METADATA:
            return self._op(old, functional.twin(target), args, kwargs)
        named = {**dict(zip([a.name for a in target._schema.arguments], args, strict=False)), **kwargs}
        places = [target._schema.arguments[k].name for k in functional.written(target)]
        refs = [named[p] for p in places]
        if not all(isinstance(r, Ref) for r in refs):
            raise Refused(f"{name} writes into a list of tensors")
        before = [self._read(r).meta["val"] for r in refs]
        if name == "copy_":
            values = [self._copied(refs[0], named["src"], before[0])]
        else:
            plain = functional.twin(target)
            known = [a.name for a in target._schema.arguments if not a.is_out]
            twins = dict(zip(known, (a.name for a in plain._schema.arguments), strict=True))
            complete, extra = ir.normalise(plain, (), {twins[k]: self._read(v) for k, v in named.items() if k in twins})
            self.stands_for = old
            node = self.emit(plain, *complete, **extra)
            values = [node] if len(refs) == 1 and isinstance(node.meta["val"], torch.Tensor) else [
                self.emit(operator.getitem, node, k) for k in range(len(node.meta["val"]))][-len(refs):]  # fmt: skip
        for ref, value, was in zip(refs, values, before, strict=True):
            functional.write(ref, self._like(value, was), self.emit)
        return refs[0] if len(refs) == 1 else refs

    def _copied(self, ref: Ref, source: Any, was: torch.Tensor) -> fx.Node:
        node = self._like(self._read(source), was)
        if functional.shape_text(node) == tuple(map(str, was.shape)):
            return node
        return self.emit(aten.expand.default, node, functional._sizes(self._read(ref), self.emit))

    def _like(self, node: fx.Node, was: torch.Tensor) -> fx.Node:
        """``node`` in the dtype and on the device of what it overwrites."""
        now = node.meta["val"]
        if now.device != was.device:
            node = self.emit(aten.to.device, node, was.device, was.dtype)
        return node if now.dtype == was.dtype else self.emit(aten.to.dtype, node, was.dtype)

    # -- nodes ---------------------------------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a normalised node and infer its value."""
        old, self.stands_for = self.stands_for, None
        if target in _RESHAPES:
            target = aten.reshape.default  # the same on any strides, which a caller or a pass may change
        if isinstance(target, OpOverload):
            args, kwargs = ir.normalise(target, args, kwargs)
        value, args, kwargs = self._value(old, target, args, kwargs)
        node = self.graph.create_node("call_function", target, args, kwargs)
        node.meta["val"] = value
        if any(n in self.differentiable for n in ir.walk_nodes((args, kwargs))) and functional.is_float(value):
            self.differentiable.add(node)
        self.made.append((node, replace(self.where, primary=old is not None)))
        return node

    def _value(self, old: fx.Node | None, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        calm = self.calm and self.cast is None and old is not None and not old.target._schema.is_mutable  # type: ignore
        if old is not None and (calm or old.meta.get("unbacked_bindings")) and "val" in old.meta:
            return functional.plain_number(old.meta["val"]), args, kwargs
        said = old.meta.get("val") if old is not None else None
        try:
            value = self._infer(target, args, kwargs)
        except Exception:
            if self.cast is None or not isinstance(said, torch.Tensor):
                raise
            value = None  # tried again below, in the dtype that export saw
        if self.cast is not None and isinstance(said, torch.Tensor) and getattr(value, "dtype", None) != said.dtype:
            args, kwargs = fx.node.map_arg(
                (args, kwargs), lambda n: self._like(n, said) if functional.is_float(n.meta["val"]) else n)  # fmt: skip
            value = self._infer(target, args, kwargs)
        return value, args, kwargs

    def _infer(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode, torch.no_grad(), self._unguarded():
            return target(*args, **kwargs)

    def _unguarded(self) -> Any:
        """Inferring a second time must not narrow the sizes that the trace allows."""
        env = self.fake_mode.shape_env
        return nullcontext() if env is None else env.suppress_guards()


def _walk(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _walk(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _walk(v)
    elif isinstance(value, Several):
        yield from value.parts
    else:
        yield value
