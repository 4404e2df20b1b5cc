"""What can be found out about a saved result without the original: inputs that fit it, whether it holds, how fast it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright import store
from graphwright.errors import InputError, InternalError
from graphwright.measure import Timing, interleaved
from graphwright.numerics import Exact, Lossy, run_double, run_pure, sqnr_db
from graphwright.optimized import Optimized
from graphwright.saving import restore
from graphwright.structure import flatten_call

#: Quantized results against the stored graph, in dB; a value on a rounding boundary may fall to either side.
FLOOR_DB = 20.0


@dataclass(frozen=True)
class Check:
    """One line of `verify`: what was looked at, what was found, and whether it holds."""

    name: str
    found: str
    holds: bool = True


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on example inputs: a dict by keyword, a tuple by position, a tensor alone, or a `Call`."""
    c = arguments(inputs)
    with torch.no_grad():
        return model(*c.args, **c.kwargs)


def arguments(inputs: Any) -> Call:
    """Example inputs as the arguments of a call."""
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs))
    return Call(inputs if type(inputs) is tuple else (inputs,), {})


def leaves(output: Any) -> list[Tensor]:
    """The tensors of an output, in order; output objects with named fields are looked into."""
    return flatten_call((output,), {})[0]


def same_bits(one: Any, other: Any) -> bool:
    """Whether two outputs hold the same tensors, bit for bit (NaN equals NaN)."""
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    return bool(pairs) and all(a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(x: Tensor) -> Tensor:
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return x.contiguous().view(whole[x.element_size()]) if x.is_floating_point() else x


def drawn(path: Path, seed: int = 0) -> list[Call]:
    """Inputs that fit each program of a saved result: floats from the normal distribution, integers from {0, 1}."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for variant in store.load(path).variants:
        flat = []
        for (shape, dtype), node in zip(variant.example, variant.program.placeholders, strict=True):
            kind = getattr(torch, dtype.removeprefix("torch."))
            values = (
                torch.randn(shape, generator=random)
                if kind.is_floating_point
                else torch.randint(0, 2, shape, generator=random)
            )
            flat.append(values.to(node.meta["val"].device, kind))
        args, kwargs = variant.program.signature.inputs.unflatten(flat)
        found.append(Call(tuple(args), dict(kwargs)))
    return found


def one(result: Any) -> Optimized:
    """A result with all of its programs; a decoder's, prefill and step, as the programs of one."""
    if isinstance(result, Optimized):
        return result
    halves = [half.fast for half in (result._prefill, result._step)]
    both = Optimized(None, None)
    both.__dict__["_variants"] = [v for fast in halves for v in fast._variants]
    both.__dict__["_report"] = halves[0].report
    return both


def verify(path: Path, original: nn.Module | None = None, inputs: Any = None, seed: int = 0) -> Iterator[Check]:
    """Check a saved result: the file, its graphs, its kernels against them, and against the original where it is given.

    Args:
        original: the model it was made from.
        inputs: real inputs for all checks that run the model; drawn at random by default.

    Raises:
        LoadError: the file is truncated, altered, foreign or of an unknown version.
        InputError: the result can't run on `inputs`.
    """
    fast = one(restore(path))
    size = path.stat().st_size / 1e6
    yield Check(
        "file", f"{size:.2f} MB, checksums hold, {len(fast._variants)} program{'s' * (len(fast._variants) != 1)}"
    )
    given = [arguments(inputs)] if inputs is not None else drawn(path, seed)
    for k, c in enumerate(given):
        tag = f" of program {k + 1}" if len(given) > 1 else ""
        flat, spec = flatten_call(c.args, c.kwargs)
        reasons = [v.covers(flat, spec) for v in fast._variants]
        if None not in reasons:
            raise InputError(f"no program covers these inputs: {reasons[0]}", where="--inputs")
        variant = fast._variants[reasons.index(None)]
        yield _graph(variant.built.running, tag)
        first, second = call(fast, c), call(fast, c)
        outs = leaves(first)
        finite = all(bool(torch.isfinite(x).all()) for x in outs if x.is_floating_point())
        yield Check(f"outputs{tag}", "finite" if finite else "not all finite", finite)
        same = same_bits(first, second)
        yield Check(f"repeat{tag}", "same bits twice" if same else "two calls differ", same)
        yield _numbers(variant.built, flat, outs, tag)
        if original is not None:
            yield _against(leaves(call(original, c)), outs, variant.built, tag)
    for note in fast.report.warnings:
        yield Check("note", note)


def _graph(program: Any, tag: str) -> Check:
    try:
        program.verify()
    except InternalError as error:
        return Check(f"graph{tag}", error.what, False)
    return Check(f"graph{tag}", f"{len(program.nodes)} ops, all invariants hold")


def _numbers(built: Any, flat: list[Tensor], outs: list[Tensor], tag: str) -> Check:
    """The kernels against the stored graph, run op by op.

    Exact kernels are held to the rule for exact passes. Kernels may leave out a quantization that the graph asks for
    (its neighbour runs in float), so quantized ones may differ from the graph by as much as quantization itself changes.
    """
    program = built.running
    plain = run_pure(program, flat)
    if _exact(built):
        try:
            reference = run_double(program, flat)
        except RuntimeError:  # an op without a float64 kernel
            reference = plain
        rules: list[Exact | Lossy] = [Exact()] * len(outs)
    else:
        reference, floats = plain, unquantized(program, flat)
        own = [sqnr_db(f, p) if p.is_floating_point() else FLOOR_DB for f, p in zip(floats, plain, strict=True)]
        rules = [Lossy(min(FLOOR_DB, db - 3)) for db in own[: len(outs)]]
    problems, worst = [], float("inf")
    # Mutated values follow the user's outputs in `reference` and `plain`.
    for rule, want, near, got in zip(rules, reference, plain, outs, strict=False):
        if problem := rule.failure(want, near, got):
            problems.append(problem)
        elif got.is_floating_point():
            worst = min(worst, sqnr_db(want.double().nan_to_num(), got.double().nan_to_num()))
    said = "equal to the stored graph" if worst == float("inf") else f"{worst:.1f} dB against the stored graph"
    return Check(f"kernels{tag}", "; ".join(problems) or said, not problems)


def _exact(built: Any) -> bool:
    """Whether the result promises the original's numbers up to float rounding."""
    quantized = any(str(n.target).startswith("graphwright.quantize") for n in built.running.nodes)
    return not quantized and all(c.precision == "f32" for c in built.lowered.choices)


class _Unquantized(fx.Interpreter):
    """Runs a graph without the rounding of its activations: a quantize and its dequantize pass the value on."""

    def run_node(self, n: fx.Node) -> Any:
        name = str(n.target).removesuffix(".default")
        if name in ("graphwright.quantize", "graphwright.dequantize"):
            value = self.env[n.args[0]]
            if name == "graphwright.quantize" or value.is_floating_point():
                return value
        return super().run_node(n)


def unquantized(program: Any, flat: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(_Unquantized(program.graph_module).run(*flat))


def _against(want: list[Tensor], outs: list[Tensor], built: Any, tag: str) -> Check:
    name = f"original{tag}"
    if [x.shape for x in want] != [x.shape for x in outs]:
        shapes = ", ".join(str(tuple(x.shape)) for x in want)
        return Check(name, f"gives other shapes: {shapes}", False)
    worst = min((sqnr_db(a, b) for a, b in zip(want, outs, strict=True) if a.is_floating_point()), default=float("inf"))
    exact = _exact(built)
    said = "equal" if worst == float("inf") else f"{worst:.1f} dB"
    return Check(name, f"{said} against the original's outputs", not exact or worst > 80)


def race(
    models: Mapping[str, nn.Module], inputs: Any, *, rounds: int, budget_s: float | None = None
) -> dict[str, Timing]:
    """Milliseconds per call of each model on the same inputs, in interleaved rounds."""
    calls: list[Callable[[], Any]] = [lambda m=m: call(m, inputs) for m in models.values()]
    return dict(zip(models, interleaved(calls, rounds=rounds, budget_s=budget_s, warmup=2), strict=True))


def shapes(inputs: Any) -> str:
    """Example inputs in words: `input_ids 8x160, attention_mask 8x160`."""
    c = arguments(inputs)
    pairs = [*(("", x) for x in c.args), *c.kwargs.items()]
    return ", ".join(f"{name} {_shape(x)}".strip() for name, x in pairs)


def _shape(x: Any) -> str:
    return ("x".join(map(str, x.shape)) or "scalar") if isinstance(x, Tensor) else type(x).__name__


def timing_table(timings: Mapping[str, Timing], title: str) -> Any:
    """A `rich.table.Table` of what `race` gave; speeds are relative to the first."""
    from rich import box
    from rich.table import Table

    threads = torch.get_num_threads()
    table = Table(title=f"{title}, {threads} thread{'s' if threads != 1 else ''}", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("", "median", "p95", "minimum", "speed"):
        table.add_column(heading, justify="left" if not heading else "right")
    first = next(iter(timings.values()))
    for name, t in timings.items():
        times = (f"{ms:.3f} ms" for ms in (t.median, t.p95, t.minimum))
        table.add_row(name, *times, f"{first.median / t.median:.2f} x")
    return table
