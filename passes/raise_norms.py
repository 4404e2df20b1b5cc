"""Recognise layer norm and RMS norm written out in arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from graphwright.ir import Program, args_by_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.passes._algebra import enclosed, last_axis, sites_in, without_casts
from graphwright.passes._nodes import is_number, is_op, is_tensor, only_user, same_shape, sweep, val

aten = torch.ops.aten


@dataclass
class _Norm:
    """A normalisation found: what it reads, where it ends, and the ops in between.

    Attributes:
        x: input.
        centred: layer norm; otherwise RMS norm.
    """

    x: fx.Node
    last: fx.Node
    eps: float
    centred: bool
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    cone: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class RaiseNorms(Pass):
    """Turn written-out layer norm and RMS norm over the last axis into the op."""

    name = "raise-norms"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        for node in program.nodes:
            if node._erased or not is_op(node, "aten.rsqrt", "aten.sqrt", "aten.pow"):
                continue
            found = _read(program, node)
            if isinstance(found, str):
                result.refuse(site_of(node), found)
            if not isinstance(found, _Norm) or self.refused(result, found.last):
                continue
            if reason := _reason(found):
                result.refuse(site_of(found.last), reason)
                continue
            shape = [int(val(found.x).shape[-1])]
            with program.graph.inserting_before(found.last):
                op = aten.layer_norm.default if found.centred else aten.rms_norm.default
                affine = (found.weight, found.bias) if found.centred else (found.weight,)
                new = program.call(op, found.x, shape, *affine, found.eps, sites=sites_in(found.cone), like=found.last)
            result.change(
                site_of(found.last), f"{len(found.cone)} ops → {'layer_norm' if found.centred else 'rms_norm'}"
            )
            inputs = found.last.all_input_nodes
            program.replace(found.last, new)
            program.prune(inputs)  # the next one must not find them among its readers
        if result.changes:
            sweep(program, result)
        return result


def _reason(found: _Norm) -> str | None:
    name = "layer norm" if found.centred else "RMS norm"
    if not isinstance(val(found.x).shape[-1], int):
        return f"it spells {name} over an axis of unknown size"
    if val(found.last).dtype != val(found.x).dtype:
        return f"it spells {name}, but gives {val(found.last).dtype} for {val(found.x).dtype}"
    reason = enclosed(found.last, found.cone - {found.last})
    return f"it spells {name}, but {reason}" if reason else None


def _read(program: Program, root: fx.Node) -> _Norm | str | None:
    """The normalisation whose root of a mean square is ``root``; a string where it is one over other axes."""
    inverse = is_op(root, "aten.rsqrt") or (is_op(root, "aten.pow") and args_by_name(root).get("exponent") == -0.5)
    if is_op(root, "aten.pow") and not inverse:
        return None
    cone = {root}
    shifted = root.args[0]
    if not is_op(shifted, "aten.add") or not is_number(shifted.args[1]) or shifted.kwargs.get("alpha", 1) != 1:
        return None
    eps, mean = float(shifted.args[1]), shifted.args[0]  # type: ignore[arg-type]
    cone |= {shifted, mean}  # type: ignore[arg-type]
    z = _squared_mean(mean, cone)
    if z is None or isinstance(z, str):
        return z
    scaled = _scaled_by(root, inverse)
    if scaled is None:
        return None
    last, what = scaled
    cone.add(last)
    centre = _centred(z, cone) if not is_op(mean, "aten.var") else z
    if is_op(mean, "aten.var"):
        if not _is_centred_of(what, z, cone):
            return None
    elif what is not z:
        return None
    start = centre if centre is not None else z
    through = set(cone)
    found = _Norm(without_casts(start, through), last, eps, centre is not None, cone=through)
    _affine(program, found)
    if val(found.x).dtype != val(found.last).dtype and found.x is not start:  # nothing is converted back: the conversion before is none of its own
        found = _Norm(start, last, eps, centre is not None, cone=cone)
        _affine(program, found)
    return found


def _squared_mean(mean: object, cone: set[fx.Node]) -> fx.Node | str | None:
    """``z`` of ``mean(z², -1, keepdim)``, or ``x`` of ``var(x, -1, correction=0, keepdim)``."""
    if not is_op(mean, "aten.mean", "aten.var") or not is_tensor(mean):
        return None
    assert isinstance(mean, fx.Node)
    given, source = args_by_name(mean), mean.args[0]
    if is_op(mean, "aten.var"):
        if given.get("correction", 1 if given.get("unbiased", True) else 0) != 0:
            return None
        z = source
    else:
        product = is_op(source, "aten.mul") and source.args[0] is source.args[1]
        if not (product or is_op(source, "aten.square") or (is_op(source, "aten.pow") and source.args[1] == 2)):
            return None
        z = source.args[0]
        cone.add(source)
    if not is_tensor(z) or not given.get("keepdim"):
        return None
    if not last_axis(z, given.get("dim")):
        return f"it normalises over axes {given.get('dim')}, not over the last one alone"
    return z


def _scaled_by(root: fx.Node, inverse: bool) -> tuple[fx.Node, fx.Node] | None:
    """The product (or quotient) that ``root`` scales something in, and that something."""
    user = only_user(root)
    if user is None:
        return None
    if inverse and is_op(user, "aten.mul"):
        other = user.args[1] if user.args[0] is root else user.args[0]
    elif not inverse and is_op(user, "aten.div") and user.args[1] is root and user.kwargs.get("rounding_mode") is None:
        other = user.args[0]
    else:
        return None
    return (user, other) if is_tensor(other) else None  # type: ignore[return-value]


def _centred(z: fx.Node, cone: set[fx.Node]) -> fx.Node | None:
    """``x`` where ``z`` is ``x - mean(x, -1, keepdim)``."""
    x = z.args[0] if is_op(z, "aten.sub") else None
    return x if is_tensor(x) and _is_centred_of(z, x, cone) else None  # type: ignore[arg-type]


def _is_centred_of(z: object, x: fx.Node, cone: set[fx.Node]) -> bool:
    if not is_op(z, "aten.sub") or z.kwargs.get("alpha", 1) != 1 or z.args[0] is not x:  # type: ignore[union-attr]
        return False
    mean = z.args[1]  # type: ignore[union-attr]
    given = args_by_name(mean) if is_op(mean, "aten.mean") else {}
    if not given or given.get("self") is not x or not given.get("keepdim") or not last_axis(x, given.get("dim")):
        return False
    cone |= {z, mean}  # type: ignore[arg-type]
    return True


def _affine(program: Program, found: _Norm) -> None:
    """Take in the conversion back, the weight and the bias that may follow."""
    size = val(found.x).shape[-1]
    for _ in range(4):
        user = only_user(found.last)
        if user is None or not is_tensor(user) or not same_shape(user, found.last):
            return
        if is_op(user, "aten.to", "aten._to_copy") and val(user).dtype.is_floating_point and found.bias is None:
            found.last = user
        else:
            other = user.args[1] if user.args[0] is found.last else user.args[0]
            constant = program.constant(other)
            vector = constant is not None and tuple(constant.shape) == (size,) and constant.dtype == val(found.x).dtype
            if is_op(user, "aten.mul") and vector and found.weight is None and found.bias is None:
                found.weight = other  # type: ignore[assignment]
            elif (
                is_op(user, "aten.add")
                and vector
                and found.centred
                and found.bias is None
                and user.kwargs["alpha"] == 1
            ):
                found.bias = other  # type: ignore[assignment]
            else:
                return
            found.last = user
        found.cone.add(found.last)
