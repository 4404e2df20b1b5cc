"""Running the user's model once on the example: what it answers, what it writes, and in whose words it fails."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphwright import ir
from graphwright.accelerator import random_devices
from graphwright.capture.sites import outside_torch, short_path
from graphwright.errors import InputError
from graphwright.structure import Spec, flatten


@dataclass(frozen=True)
class Rehearsal:
    """What the model did.

    Attributes:
        outputs: the tensors it returned; None where the structure of the answer is not ours to describe.
        spec: their structure.
        inputs: the input tensors after the run.
        buffers: buffers that it wrote, with their new values.
        refusal: why the structure could not be described.
        attributes: plain attributes of modules that the run changed, by name.
        fused_differs: torch.nn's fused inference path gives other outputs.
    """

    outputs: list[torch.Tensor] | None
    spec: Spec | None
    inputs: list[torch.Tensor]
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    refusal: str | None = None
    attributes: tuple[str, ...] = ()
    fused_differs: bool = False


_MISSING = object()


def rehearse(model: nn.Module, leaves: Sequence[torch.Tensor], spec: Spec) -> Rehearsal:
    """Run the model on copies of the inputs and put back whatever it changes.

    Raises:
        InputError: the model rejects the inputs; its own error is quoted, with the user's line.
    """
    mine = clone_sharing(leaves)
    with untouched(model) as versions, plain_attention(), torch.no_grad():
        torch.manual_seed(0)
        args, kwargs = spec.unflatten(mine)
        try:
            answer = model(*args, **kwargs)
        except Exception as error:
            raise rejected(model, leaves, error) from error
        set_ = tuple(f"{n}.{k}".lstrip(".") for n, m in model.named_modules() for k, v in m.__dict__.items()
                     if not k.startswith("__") and versions.get((n, k), _MISSING) is not v)  # fmt: skip
        changed = {n: b.detach().clone() for n, b in model.named_buffers() if versions.get(n) != (id(b), b._version)}
        try:
            outputs, found = flatten(answer, name="output")
        except InputError as error:
            return Rehearsal(None, None, mine, changed, f"{error.where}: {error.what}", set_)
        outputs = [t.detach().clone() for t in outputs]
    return Rehearsal(outputs, found, mine, changed, None, set_, _fused_differs(model, leaves, spec, outputs))


def _fused_differs(model: nn.Module, leaves: Sequence[torch.Tensor], spec: Spec, plain: list[torch.Tensor]) -> bool:
    if model.training or not any(isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoder)) for m in model.modules()):
        return False
    args, kwargs = spec.unflatten(clone_sharing(leaves))
    with untouched(model), torch.no_grad():
        torch.manual_seed(0)
        try:
            fused = flatten(model(*args, **kwargs))[0]
        except Exception:  # noqa: BLE001 - the fused path alone fails: nothing to compare with
            return True
    return any(_differs(a, b) for a, b in zip(fused, plain, strict=False))


def rejected(model: nn.Module, leaves: Sequence[torch.Tensor], error: Exception) -> InputError:
    """The model's own error as ours, with the user's line and a hint where one is known."""
    place = where(error)
    weights = [*model.parameters(), *model.buffers()]
    devices = {str(t.device) for t in [*leaves, *weights]}
    hint = "Call the model on the same inputs without Graphwright to see its full traceback."
    if len(devices) > 1:
        hint = f"Inputs and weights lie on {', '.join(sorted(devices))}: bring them to one device first."
    homes = {t.device for t in weights}
    strangers = [k for k, t in enumerate(leaves) if t.device not in homes]
    if len(homes) == 1 and strangers:
        home = next(iter(homes))
        names = ", ".join(f"input {k}" for k in strangers[:3])
        lies = "lies" if len(strangers) == 1 else "lie"
        hint += f" {names} {lies} on {leaves[strangers[0]].device}, the model on {home}: pass x.to({str(home)!r})."
    said = (str(error).strip().splitlines() or ["(no message)"])[0]
    return InputError(f"the model rejects the example inputs: {type(error).__name__}: {said}", where=place, hint=hint)


def where(error: BaseException) -> str | None:
    """The innermost line outside torch and Graphwright that an error passed through, as ``"file.py:12"``."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f"{short_path(f.filename)}:{f.lineno}" for f in reversed(frames) if outside_torch(f.filename)), None)


# -- leaving no trace ------------------------------------------------------------------------------------------------


@contextmanager
def untouched(model: nn.Module) -> Iterator[dict[Any, Any]]:
    """Run the model inside without leaving a trace: buffers, attributes and the random state come back.

    Yields:
        what was there before the run: identity and version of each buffer by name, attributes by (module, name).
    """
    kept = [(b, b.detach().clone(), _version(b)) for b in model.buffers()]
    versions = {n: (id(b), _version(b)) for n, b in model.named_buffers()}
    versions |= {(n, k): v for n, m in model.named_modules() for k, v in m.__dict__.items()}
    state = [(m, dict(m.__dict__)) for m in model.modules()]
    holders = [(v, v.copy()) for _, attributes in state for v in attributes.values() if type(v) in (list, dict, set, OrderedDict)]  # module hooks are the ordered ones
    with torch.random.fork_rng(devices=random_devices()):
        try:
            yield versions
        finally:
            for module, attributes in state:
                now = module.__dict__
                for k in [k for k in now if k not in attributes]:
                    del now[k]
                now.update({k: v for k, v in attributes.items() if now.get(k, _MISSING) is not v})
            for holder, content in holders:
                holder.clear()
                holder.extend(content) if isinstance(holder, list) else holder.update(content)
            for buffer, value, version in kept:
                if _version(buffer) != version:
                    with torch.no_grad():
                        buffer.copy_(value)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def plain_attention() -> Iterator[None]:
    """torch.nn's fused inference path off: the ops of attention stay visible, and equal what training computes."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def ambient_autocast() -> Iterator[list[tuple[str, torch.dtype]]]:
    """Switch the caller's autocast off and say what it was, so that it can be put into the traced model itself."""
    found = [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    with ExitStack() as stack:
        for device, dtype in found:
            stack.enter_context(torch.autocast(device, dtype, enabled=False))
        yield found


def clone_sharing(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors; those that share memory share it in the copy too."""
    storage: dict[int, torch.UntypedStorage] = {}
    return [clone_tensor(t, storage) for t in tensors]


def clone_tensor(value: torch.Tensor, storage: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    """A copy of a tensor on a copy of its storage; ``storage`` maps the addresses copied so far."""
    data = value.detach()
    ordinary = type(data) is torch.Tensor and data.layout is torch.strided and data.device.type != "meta"
    if not ordinary or data.is_conj() or data.is_neg() or data.is_quantized:
        copy = data.clone()
    else:
        place = data.untyped_storage()
        key = place.data_ptr() or id(value)
        if key not in storage:
            storage[key] = place.clone()
        copy = torch.empty(0, dtype=data.dtype, device=data.device)
        copy.set_(storage[key], data.storage_offset(), data.shape, data.stride())  # type: ignore[call-overload]
    return nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy


# -- comparing -------------------------------------------------------------------------------------------------------


def disagreement(program: ir.Program, leaves: Sequence[torch.Tensor], said: Rehearsal) -> str | None:
    """None where the program answers, and writes, what the model did; else what differs first."""
    mine = clone_sharing(leaves)
    names = [m.buffer for m in program.signature.mutations if m.buffer is not None]
    before = {n: program.tensor(n).detach().clone() for n in names}
    outputs = said.outputs or []
    try:
        with torch.random.fork_rng(devices=random_devices()), torch.no_grad():
            torch.manual_seed(0)
            found = program(*mine)
    except Exception as error:  # noqa: BLE001 - whatever it is, the graph is not used
        return f"the captured graph fails where the model does not: {type(error).__name__}: {error}"
    else:
        after = {n: program.tensor(n).detach().clone() for n in names}
    finally:
        with torch.no_grad():
            for name, value in before.items():
                program.tensor(name).copy_(value)
    if len(found) != len(outputs):
        return f"{len(found)} outputs instead of {len(outputs)}"
    pairs = [*((f"output {k}", a, b) for k, (a, b) in enumerate(zip(found, outputs, strict=True))),
             *((f"input {k} after the call", a, b) for k, (a, b) in enumerate(zip(mine, said.inputs, strict=True))),
             *((f"buffer {n} after the call", after.get(n), v) for n, v in said.buffers.items())]  # fmt: skip
    return next((f"{name} {reason}" for name, a, b in pairs if (reason := _differs(a, b))), None)


def _differs(a: torch.Tensor | None, b: torch.Tensor) -> str | None:
    if a is None:
        return "is written by the model and not by the captured graph"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}"
    if not (a.is_floating_point() or a.is_complex()):
        return None if torch.equal(a, b) else "has other values"
    wide = torch.complex128 if a.is_complex() else torch.float64
    scale = b.to(wide).abs().nan_to_num(posinf=0.0).max().item() if b.numel() else 0.0
    room = {torch.float16: 2e-2, torch.bfloat16: 5e-2}.get(a.dtype, 1e-3)
    near = torch.allclose(a.to(wide), b.to(wide), rtol=room, atol=room * scale, equal_nan=True)
    return None if near else "has other values"
