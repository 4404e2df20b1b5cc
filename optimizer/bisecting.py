"""``gw.bisect``: the first pass, the first site, or the first kernel that breaks a model's numbers, as a small program of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright.accelerator import random_devices
from graphwright.api import arguments, feed_pieces, reached
from graphwright.calibrate import Calibration, collect
from graphwright.capture import capture
from graphwright.checkup import FLOOR_DB, unquantized
from graphwright.cut import counterparts, cut, reads_before, values_of
from graphwright.errors import GraphwrightError, InputError
from graphwright.ir import Program, site_of, sites_of
from graphwright.lower import Lowered, lower
from graphwright.lower.runner import emit
from graphwright.manager import Pass, PassResult, check_patterns, narrowed
from graphwright.numerics import Lossy, run_pure, sqnr_db
from graphwright.optimized import WORKING, Optimized
from graphwright.passes.bisection import Attempt, Check, Culprit, attempt, first_bad, smallest, wide_values
from graphwright.passes.pipeline import precisions, resolve
from graphwright.repro import Repro
from graphwright.structure import flatten_call

#: what outputs of float kernels must reach against the program's own ops, in dB: less is more than rounding
_ROUNDING_DB = {torch.float64: 60.0, torch.float32: 60.0, torch.float16: 25.0, torch.bfloat16: 15.0}


def bisect(
    model: nn.Module,
    example_inputs: Any = None,
    recipe: str | Pass | Sequence[str | Pass] = "default",
    *,
    check: Check | None = None,
    calibration: Iterable[Any] | Calibration | None = None,
    kernels: bool = True,
) -> Culprit | None:
    """The first pass of a recipe that breaks a model, the first site at which it does, and a small program that shows it.

    Passes are held to what they promise: to keep the program well-formed, to report what they did, and their numbers on the
    example inputs (``numerics``). The pass found is let loose on subsets of its sites, as far as it heeds ``include`` and
    ``exclude``. Where no pass is to blame, the program is lowered as ``optimize`` would, and kernels are swapped for the ops'
    own, by halves, until the first that is off is found.

    Args:
        model: a model, or a ``Program`` (whose own example is used where no inputs are given). Of a model that can't be captured
            whole, its captured pieces are gone through in turn.
        example_inputs: a tensor, a tuple (positional) or a dict (keyword), as for ``optimize``.
        recipe: a name, a pass, or a sequence of them.
        check: takes a program; gives None where it is well, or what is wrong with it. It takes the place of the numbers, and
            runs about log2(passes) + log2(sites) times; kernels are then not looked at.
        calibration: as for ``optimize``; the example where none is given.
        kernels: False: passes only; nothing is timed.

    Returns:
        None where nothing is broken.

    Raises:
        InputError: nothing of the model can be captured, a program is broken before any pass, or there is neither check nor example.
    """
    passes = resolve(recipe)
    with WORKING, torch.random.fork_rng(devices=random_devices()):
        torch.manual_seed(0)
        programs = _captured(model, example_inputs, calibration)
        check_patterns(passes, *programs)
        for program in programs:
            if not program.calibration and program.example is not None:
                program.calibration = (program.example,)
            mine = passes if len(programs) == 1 else narrowed(passes, program)
            found, after = first_bad(program, mine, check)
            if found is not None:
                whole = [p.name for p in passes].index(found.name) if len(programs) > 1 else found.index
                return replace(found, index=whole, repro=_of_pass(found, mine[found.index]))
            if check is None and kernels and after.example is not None:
                off = _kernel(after, len(passes), precisions(passes))
                if off is not None:
                    return off
    return None


def _captured(model: Any, example_inputs: Any, calibration: Any) -> list[Program]:
    """The model as a program or, where it can't be captured whole, the pieces that the example reaches; with example and data."""
    if isinstance(model, Optimized):
        raise InputError("this is a result, and its passes are done", where="bisect(model=...)", hint="Pass the original model and the recipe.")
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, an nn.Module is wanted", where="bisect(model=...)")
    if example_inputs is None and not isinstance(model, Program):
        raise InputError(
            "example_inputs are missing", where="bisect", hint="Pass them as for optimize: a tensor, a tuple or a dict."
        )
    if isinstance(model, Program):
        program = model.copy()
    else:
        args, kwargs = arguments(example_inputs)
        leaves, spec = flatten_call(args, kwargs)
        found = capture(model, args, kwargs)
        if found.program is None:
            feed_pieces(found, spec, leaves, calibration)
            programs = [slot.program for slot in reached(found)]
            if not programs:
                raise InputError(f"nothing of the model could be captured: {'; '.join(map(str, found.regions[:3]))}", where="bisect")
            return programs
        program = found.program
    if example_inputs is not None:
        program.example = tuple(x.detach() for x in flatten_call(*arguments(example_inputs))[0])
    if calibration is not None:
        program.calibration = collect(calibration, program.signature.inputs, program)
    return [program]


# -- a pass's fault, cut out -----------------------------------------------------------------------------------------


def _of_pass(found: Culprit, p: Pass) -> Repro | None:
    """The smallest part of the program on which the pass's fault shows; None where nothing can be cut out."""
    if found.before.example is None:
        return None
    options = {k: repr(v) for k, v in p.options().items() if k not in ("include", "exclude")}
    make = lambda before, after, note="": Repro("pass", found.name, found.problem, found.site, before, after, p.numerics, {}, options, note, p)
    after = found.narrowed if found.narrowed is not None else found.after
    try:
        if found.kind == "numbers":
            return _difference_cut(found, after, make)
        return _alone(found, p, make)
    except GraphwrightError:
        raise
    except Exception as error:  # noqa: BLE001  what was found stands without it
        found.result.notes.append(f"no small program could be cut out: {type(error).__name__}: {error}")
        return None


def _difference_cut(found: Culprit, after: Program, make: Callable[..., Repro]) -> Repro | None:
    """Cut between the nearest values that agree and the first that does not; wider cuts where that shows no fault."""
    before, leaves = found.before, found.before.example or ()
    same, place = counterparts(before, after)
    was, now = values_of(before, leaves), values_of(after, leaves)
    wide = wide_values(before, leaves, list(place.values()))
    wrong = {n for n, o in place.items() if found.numerics.failure(wide.get(o, was[o]), was[o], now[n])}
    ends = [(o, n) for n, o in place.items() if n in wrong] or [(o, n) for n, o in zip(after.output.args[0], before.output.args[0], strict=True) if isinstance(n, fx.Node)]
    borders = {**same, **{n: o for n, o in place.items() if n not in wrong}}
    tensors = lambda pairs: {n: o for n, o in pairs.items() if isinstance(was.get(o), Tensor) and n.op == "call_function"}
    for stops, (old, new), note in (
        (tensors(borders), ends[0], ""),
        (tensors(same), ends[0], "cut back to what the pass left untouched"),
        ({}, ends[-1], "the whole way from the inputs"),
    ):
        pair = _cut_pair(before, after, (old, new), stops, was, now)
        repro = make(*pair, note)
        if repro.replay().reproduced:
            return repro
    differing = next(((o, n) for n, o in place.items() if not torch.equal(was[o], now[n])), ends[0])
    pair = _cut_pair(before, after, differing, tensors({**same, **{n: o for n, o in place.items() if torch.equal(was[o], now[n])}}), was, now)
    return make(*pair, "on this part alone the pass keeps its promise")


def _cut_pair(before: Program, after: Program, ends: tuple[fx.Node, fx.Node], stops: Mapping[fx.Node, fx.Node],
              was: Mapping[fx.Node, Any], now: Mapping[fx.Node, Any]) -> tuple[Program, Program]:  # fmt: skip
    """The parts of both programs behind one pair of nodes, with the same inputs.

    Args:
        stops: nodes of ``after`` with those of ``before`` at which the cut may be made.
    """
    old, new = ends
    into = {o: n for n, o in stops.items()}
    met_old = reads_before([old], into)[1]
    met_new = reads_before([new], stops)[1]
    names = {n.name: n for n in after.placeholders}
    olds = dict.fromkeys([*met_old, *(stops.get(n) or next(p for p in before.placeholders if p.name == n.name) for n in met_new)])
    order = {n: k for k, n in enumerate(before.graph.nodes)}
    olds = dict.fromkeys(sorted((o for o in olds if isinstance(was[o], Tensor)), key=order.__getitem__))
    inputs_old = {o: was[o] for o in olds}
    inputs_new = {into[o] if o in into else names[o.name]: was[o] for o in olds}
    return cut(before, [old], inputs_old, was), cut(after, [new], inputs_new, now)


def _alone(found: Culprit, p: Pass, make: Callable[..., Repro]) -> Repro | None:
    """The smallest neighbourhood of the site on which the pass fails in the same way."""
    before, kind = found.before, found.kind
    held = values_of(before, before.example or ())
    start = [n for n in before.nodes if set(sites_of(n)) & set(found.sites)] or before.nodes
    region = set(start)
    while True:
        outs = [n for n in before.nodes if n in region and isinstance(held[n], Tensor) and any(u not in region for u in n.users)]
        edge = {n for m in region for n in m.all_input_nodes if n not in region and n.op != "get_attr" and isinstance(held[n], Tensor)}
        if outs:
            order = {n: k for k, n in enumerate(before.graph.nodes)}
            small = cut(before, outs, {n: held[n] for n in sorted(edge, key=order.__getitem__)}, held)
            tried = attempt(p, small)
            if tried.kind == kind:
                return make(small, tried.program if _keepable(tried) else None)
        wider = region | {n for m in region for n in (*m.all_input_nodes, *m.users) if n.op == "call_function"}
        if wider == region:
            return None
        region = wider


def _keepable(tried: Attempt) -> bool:
    """Whether a program is whole enough to be kept beside the report of what is wrong with it."""
    return tried.kind == "report"


# -- kernels ---------------------------------------------------------------------------------------------------------


def _kernel(program: Program, count: int, allowed: frozenset[str]) -> Culprit | None:
    """The first kernel whose numbers are off, where lowering breaks what the passes left whole."""
    leaves = program.example or ()
    plain = run_pure(program, leaves)
    try:
        lowered = lower(program, allowed=allowed, example=leaves)
    except Exception:  # noqa: BLE001  no assignment of kernels runs: the first one is taken without a race, and looked into
        lowered = lower(program, allowed=allowed, example=())
    rules = _rules(program, lowered, plain, leaves)
    native = lower(program, plan={})

    def problem(swapped: Sequence[int]) -> str | None:
        """What is wrong with the outputs when these works run as chosen and all others by the op's own kernel."""
        chosen = [lowered.chosen[k] if k in swapped else native.chosen[k] for k in range(len(lowered.chosen))]
        try:
            with program.preserved(leaves):
                outs = emit(lowered.analysis, chosen)(*[x.clone() for x in leaves])
        except Exception as error:  # noqa: BLE001  a kernel that raises is as bad as one that is wrong
            return f"it raised {type(error).__name__}: {error}"
        pairs = zip(rules, plain, outs, strict=False)  # mutated values follow the user's outputs in `plain`
        return next((f"output {k}: {said}" for k, (rule, was, now) in enumerate(pairs) if (said := rule.failure(was, was, now))), None)

    spots = [k for k, (c, _) in enumerate(lowered.chosen) if c.name != "aten.native"]
    said = problem(spots)
    if said is None:
        return None
    found = smallest(spots, lambda some: problem(some) is not None)
    works = [lowered.analysis.works[k] for k in found]
    names = {w.node.name: lowered.chosen[k][0].name for k, w in zip(found, works, strict=True)}
    how = "that kernel alone breaks the outputs" if len(found) == 1 else f"these {len(found)} kernels break the outputs together, none does alone"
    result = PassResult([(w.site, f"runs as {names[w.node.name]}") for w in works], notes=list(lowered.notes))
    rule = next((r for r in rules if isinstance(r, Lossy)), Lossy(60.0))
    repro = _of_kernel(program, works, names, str(said), rule)
    return Culprit(count, names[works[-1].node.name], str(problem(found)), program, program, result, rule, works[-1].site,
                   tuple(w.site for w in works), how, stage="kernel", repro=repro)  # fmt: skip


def _rules(program: Program, lowered: Lowered, plain: Sequence[Any], leaves: Sequence[Tensor]) -> list[Lossy]:
    """What each output must reach against the program run op by op.

    Kernels may leave out a quantization that the graph asks for (its neighbour runs in float), so quantized ones may differ
    from the graph by as much as quantization itself changes.
    """
    precise = all(c.precision == "f32" for c, _ in lowered.chosen) and not lowered.analysis.qparams
    dtypes = [t.dtype if isinstance(t, Tensor) else None for t in plain]
    if precise:
        return [Lossy(_ROUNDING_DB.get(d, 60.0)) for d in dtypes]  # type: ignore[arg-type]
    floats = unquantized(program, list(leaves))
    own = [sqnr_db(f, p) if isinstance(p, Tensor) and p.is_floating_point() else FLOOR_DB for f, p in zip(floats, plain, strict=True)]
    return [Lossy(min(FLOOR_DB, db - 3)) for db in own]


def _of_kernel(program: Program, works: Sequence[Any], names: Mapping[str, str], problem: str, rule: Lossy) -> Repro | None:
    """The works alone, with the quantization around them, on the values that they read in the model."""
    leaves = program.example or ()
    held = values_of(program, leaves)
    last = works[-1]
    outs = [last.node, *_dequantized(last.node)]
    inside = {w.node for w in works}
    reads = dict.fromkeys(r.value for w in works for r in w.reads if r.value not in inside and r.value.op != "get_attr")
    try:
        small = cut(program, outs, {n: held[n] for n in reads if isinstance(held.get(n), Tensor)}, held)
        repro = Repro("kernel", names[last.node.name], problem, site_of(last.node), small, None, rule, dict(names))
        if repro.replay().reproduced:
            return repro
    except Exception as error:  # noqa: BLE001  a kernel may be there in its place in the model only
        problem = f"{problem} (alone: {type(error).__name__}: {error})"
    outputs = [n for n in program.output.args[0] if isinstance(n, fx.Node)]
    whole = cut(program, outputs, {n: held[n] for n in program.placeholders}, held)
    repro = Repro("kernel", names[last.node.name], problem, site_of(last.node), whole, None, rule, dict(names), note="the whole program: alone the kernel is right")
    return repro if repro.replay().reproduced else None


def _dequantized(node: fx.Node) -> list[fx.Node]:
    """What readers see of a value that is quantized right behind its op."""
    name = lambda n: getattr(getattr(n.target, "_schema", None), "name", "")
    return [d for q in node.users if name(q) == "graphwright::quantize" for d in q.users if name(d) == "graphwright::dequantize"]
