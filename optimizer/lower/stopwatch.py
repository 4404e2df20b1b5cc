"""Timing of candidates and conversions on a work's real shapes, checked before they are timed, cached on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.accelerator import Clock, Cuda
from graphwright.backends.base import (
    HALF,
    NATIVE,
    Candidate,
    Format,
    QParams,
    Refused,
    Work,
    channels_last,
    hint,
)  # fmt: skip
from graphwright.cache import JsonCache
from graphwright.lower.conversions import conversion, row_integers
from graphwright.measure import CacheFlusher, last_level_cache_bytes, machine
from graphwright.numerics import rms, sqnr_db

#: what a candidate's result must reach against the op's own reference, in dB, before it is timed
FLOORS_DB = {"f32": 90.0, "bf16": 25.0, "fp16": 40.0}
#: the same for results that are rounded to a shorter float
_SHORT_DB = {torch.float16: 50.0, torch.bfloat16: 33.0}
#: rounds at the most, seconds per candidate at the most, and how far behind the best a candidate stays in the race
_ROUNDS, _BUDGET_S, _BEHIND = 8, 0.02, 1.4


class Stopwatch:
    """Times candidates; equal works are timed once.

    Args:
        weight_bytes: size of the model's tensors; past the last-level cache, every timed call finds it flushed.
        cuda: the GPU that all lies on; its cache is always empty when a timed call begins.
        fresh: ignore the cache on disk.
    """

    def __init__(self, weight_bytes: int, cuda: Cuda | None = None, *, fresh: bool = False):
        self.cold = cuda is None and weight_bytes > last_level_cache_bytes()
        self._clock = Clock(cuda, CacheFlusher() if self.cold else None)
        self._cache = JsonCache("timings")
        self._fresh = fresh
        self._known: dict[str, float | str] = {}
        base = [machine(), torch.get_num_threads(), self.cold, 3] if cuda is None else [cuda.facts, torch.__version__, 1]
        self._base = json.dumps(base, sort_keys=True)
        self.measured = 0

    def work(self, work: Work, options: Sequence[Candidate]) -> list[float | str]:
        """Milliseconds per candidate, or why it can't be used. Works without a choice take no time."""
        if len(options) == 1 or not any(c.timed for c in options):
            return [0.0] * len(options)
        base = signature(work)
        keys = [self._key(base, c.name + c.version) for c in options]
        found = [(self._known.get(key) if c.foreign else self._recall(key)) if c.timed else 0.0 for key, c in zip(keys, options, strict=True)]
        if None in found:
            # all of them anew: times are only comparable when they were taken in turns
            for k, value in self._race(work, options).items():
                found[k] = self._keep(keys[k], value, kept=not options[k].foreign)
        return [x if x is not None else 0.0 for x in found]

    def _race(self, work: Work, options: Sequence[Candidate]) -> dict[int, float | str]:
        """Check every candidate, then time those that are right in turns; whoever falls behind drops out early."""
        found: dict[int, float | str] = {}
        calls: dict[int, tuple[Callable[..., Any], list[Any]]] = {}
        inputs, wanted = _oracle(work, next(c for c in options if c.name == "aten.native"))
        for k, candidate in enumerate(options):
            if not candidate.timed:
                continue
            try:
                with torch.no_grad():
                    call = candidate.build()
                    problem = None if candidate.name == "aten.native" else check(work, candidate, call, inputs, wanted)
                    forms = zip(work.reads, candidate.needs, work.read_qparams, strict=True)
                    calls[k] = call, [sample(r.value.meta["val"], f, q) for r, f, q in forms]
                if problem:
                    found[k] = f"wrong result: {problem}"
                    del calls[k]
            except Refused as why:
                found[k] = f"refused: {why}"
            except Exception as error:  # a kernel may refuse a shape in any way it likes; the reason is kept for explain  # noqa: BLE001
                found[k] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
                calls.pop(k, None)
        return found | self._turns(calls)

    def _turns(self, calls: dict[int, tuple[Callable[..., Any], list[Any]]]) -> dict[int, float | str]:
        calls, best = dict(calls), dict.fromkeys(calls, math.inf)
        alive, spent = set(calls), 0.0
        with torch.no_grad():
            for turn in range(_ROUNDS):
                for k in sorted(alive):
                    if turn == 0:
                        calls[k] = self._clock.ready(*calls[k]), calls[k][1]
                    took = self._clock.once(*calls[k])
                    best[k], spent = min(best[k], took), spent + took
                self.measured += len(alive)
                lead = min(best.values(), default=0.0)
                alive = {k for k in alive if best[k] <= lead * (_BEHIND if turn else 2 * _BEHIND)}
                if turn >= 2 and (len(alive) <= 1 or spent > _BUDGET_S * len(calls)):
                    break
        return {k: 1e3 * b for k, b in best.items()}

    def convert(self, value: fx.Node, source: Format, target: Format, params: QParams | None) -> float:
        """Milliseconds of one conversion."""
        val = value.meta["val"]
        key = self._key(json.dumps([_describe(val)]), f"{source}→{target}")
        known = self._recall(key)
        if not isinstance(known, float):
            call = conversion(source, target, params, val)
            known = self._turns({0: (call, [sample(val, source, params)])})[0]
            self._keep(key, known)
        return known

    def flush(self) -> None:
        """Write what was measured to disk."""
        self._cache.flush()

    # -- inside ------------------------------------------------------------------------------------------------

    def _key(self, base: str, name: str) -> str:
        return hashlib.sha256(f"{self._base}\n{base}\n{name}".encode()).hexdigest()[:32]

    def _recall(self, key: str) -> float | str | None:
        if key not in self._known and not self._fresh:
            stored = self._cache.get(key)
            if isinstance(stored, (float, int, str)):
                self._known[key] = stored if isinstance(stored, str) else float(stored)
        return self._known.get(key)

    def _keep(self, key: str, value: float | str, kept: bool = True) -> float | str:
        self._known[key] = value
        if kept:
            self._cache.put(key, value)
        return value


def sample(val: Any, form: Format, params: QParams | None) -> Any:
    """Numbers of a value's shape, dtype and strides at the example inputs, held as ``form``."""
    if not isinstance(val, Tensor):
        return hint(val) if isinstance(val, (torch.SymInt, int)) else val
    shape = [hint(s) for s in val.shape]
    device = val.device
    seeded = lambda: torch.Generator(device).manual_seed(0)
    if form.kind == "q":
        assert params is not None
        made = torch.randint(params.low, params.high + 1, shape, generator=seeded(), dtype=torch.int32, device=device).to(params.dtype)
    elif val.dtype.is_floating_point:
        made = torch.randn(shape, generator=seeded(), device=device).to(HALF.get(form.kind, val.dtype))
        if form.kind == "rows":
            return row_integers(made)
    elif val.dtype == torch.bool:
        made = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        made = torch.zeros(shape, dtype=val.dtype, device=device)
    if form.layout == "last":
        return made.contiguous(memory_format=channels_last(made))
    strides = [hint(s) for s in val.stride()]
    if form == NATIVE and 0 not in strides and list(made.stride()) != strides and made.numel():
        made = torch.empty_strided(shape, strides, dtype=made.dtype, device=device).copy_(made)
    return made


def _oracle(work: Work, native: Candidate) -> tuple[list[Any], Any]:
    """Native inputs that any quantized form can hold exactly, and what the op gives on them."""
    inputs = []
    for read, params in zip(work.reads, work.read_qparams, strict=True):
        val = read.value.meta["val"]
        if params is not None and read.quantized:
            q = sample(val, Format("q"), params)
            inputs.append(((q.float() - params.zero_point) * params.scale).to(val.dtype))
        else:
            inputs.append(sample(val, NATIVE, None))
    return inputs, native.build()(*[x.clone() if isinstance(x, Tensor) else x for x in inputs])


def check(work: Work, candidate: Candidate, call: Callable[..., Any], inputs: Sequence[Any], wanted: Any) -> str | None:
    """None, or how the candidate's result differs from the op's own."""
    forms = []
    for x, form, params in zip(inputs, candidate.needs, work.read_qparams, strict=True):
        held: Any = conversion(NATIVE, form, params, x)(x) if isinstance(x, Tensor) and form != NATIVE else x
        forms.append(held.clone() if isinstance(held, Tensor) else held)
    before = [x.clone() if isinstance(x, Tensor) else x for x in forms] if candidate.foreign else []
    result = call(*forms)
    if candidate.foreign and (problem := _misbehaves(before, forms, result, wanted)):
        return problem
    if candidate.foreign and isinstance(wanted, (tuple, list)):
        pairs = [(g, w) for g, w in zip(result, wanted, strict=True) if isinstance(w, Tensor)]
        return next((p for g, w in pairs if (p := check(work, candidate, lambda *_, g=g: g, inputs, w))), None)
    results = (result,) if len(candidate.gives) == 1 else result
    for got, form in zip(results, candidate.gives, strict=True):
        if not isinstance(wanted, Tensor):
            return None
        if form.kind == "rows":
            got = conversion(form, NATIVE, None, wanted)(got)
        if tuple(got.shape) != tuple(wanted.shape):
            return f"shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
        if form.kind in HALF and got.dtype != HALF[form.kind]:
            return f"{got.dtype} instead of {HALF[form.kind]}"
        if form.kind == "q":
            # bfloat16 holds no 8-bit integers times a scale exactly: no step can be told from the next in its results
            short = wanted.dtype == torch.bfloat16 or "bf16" in candidate.halves
            floor = candidate.floor_db or (30.0 if short else None)
            problem = _check_integers(got, wanted, work.qparams, floor)
        elif not wanted.is_floating_point():
            problem = None if torch.equal(got, wanted) else "values differ"
        else:
            floor = candidate.floor_db or FLOORS_DB.get(candidate.precision, 60.0)
            floor = min(floor, _rounding_db(wanted), *(FLOORS_DB[k] for k in candidate.halves))
            reached = sqnr_db(wanted.nan_to_num(), got.float().nan_to_num())
            problem = None if reached >= floor else f"{reached:.0f} dB against the reference, {floor:.0f} are asked"
        if problem:
            return problem
    return None


def _rounding_db(wanted: Tensor) -> float:
    """How well two results agree that are right up to rounding, where that is less than float32's."""
    if wanted.dtype in _SHORT_DB:
        return _SHORT_DB[wanted.dtype]
    tf32 = wanted.device.type == "cuda" and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    return 50.0 if tf32 and wanted.dtype == torch.float32 else math.inf


def _misbehaves(before: Sequence[Any], after: Sequence[Any], result: Any, wanted: Any) -> str | None:
    """None, or what a kernel from outside did that none may: write into an argument, give another type than the op."""
    for k, (was, now) in enumerate(zip(before, after, strict=True)):
        if isinstance(was, Tensor) and not torch.equal(was.nan_to_num(), now.nan_to_num()):
            return f"it wrote into its argument {k}"
    several = isinstance(wanted, (tuple, list))
    if several and not (isinstance(result, (tuple, list)) and len(result) == len(wanted)):
        return f"{len(result) if isinstance(result, (tuple, list)) else 1} results instead of {len(wanted)}"
    for got, want in zip(result, wanted, strict=True) if several else ((result, wanted),):
        if isinstance(want, Tensor) and not isinstance(got, Tensor):
            return f"a {type(got).__name__} instead of a tensor"
        if isinstance(want, Tensor) and got.dtype != want.dtype:
            return f"{got.dtype} instead of {want.dtype}"
    return None


def _check_integers(got: Tensor, wanted: Tensor, params: QParams | None, floor_db: float | None) -> str | None:
    """Integers may miss the rounded reference by one step, and seldom; by more where a floor says how much."""
    assert params is not None
    if got.dtype != params.dtype:
        return f"{got.dtype} instead of {params.dtype}"
    exact = (wanted.double() / params.scale + params.zero_point).clamp(params.low, params.high)
    if floor_db is not None:
        reached = sqnr_db(exact - params.zero_point, got.double() - params.zero_point)
        return None if reached >= floor_db else f"{reached:.0f} dB against the reference, {floor_db:.0f} are asked"
    off = (got.double() - exact).abs()
    if not off.numel():
        return None
    worst, often = float(off.max()), float((off > 0.75).double().mean())
    return None if worst <= 2.0 and often < 0.02 else f"integers off by up to {worst:.1f}, {100 * often:.1f}% by more than 0.75 (rms {rms(off):.2f})"


def signature(work: Work) -> str:
    """What a work's time depends on: op, arguments, shapes, strides, dtypes."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _describe(value)
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value if isinstance(value, (int, float, bool, str, type(None))) else str(value)

    reads = [[_describe(r.value.meta["val"]), r.quantized, str(q.dtype) if q else None] for r, q in zip(work.reads, work.read_qparams, strict=True)]
    return json.dumps([work.op, plain(work.args), plain(work.kwargs), reads, str(work.qparams.dtype) if work.qparams else None], sort_keys=True)


def _describe(val: Any) -> Any:
    if not isinstance(val, Tensor):
        return str(val)
    return [str(val.dtype), [hint(s) for s in val.shape], [hint(s) for s in val.stride()]]


__all__ = ["Stopwatch", "check", "sample", "signature"]
