"""Find the first pass that breaks a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphwright.errors import InputError, InternalError
from graphwright.ir import Program
from graphwright.manager import Pass, PassResult
from graphwright.numerics import run_double, run_pure

#: Takes a program; gives None where it is well, or what is wrong with it.
Check = Callable[[Program], str | None]


@dataclass(frozen=True, eq=False)
class Culprit:
    """The first pass after which a program is broken.

    Attributes:
        index, name: which pass.
        problem: what the check said.
        before, after: the program on both sides of the pass.
        result: what the pass says it did.
    """

    index: int
    name: str
    problem: str
    before: Program
    after: Program
    result: PassResult

    def __str__(self) -> str:
        done = "; ".join(f"{site}: {what}" for site, what in self.result.changes[:5])
        return f"pass {self.index} ({self.name}): {self.problem}" + (f"\n  it did: {done}" if done else "")


def bisect(
    model: nn.Module, example_inputs: Any = None, recipe: Any = "default", *, check: Check | None = None
) -> Culprit | None:
    """The first pass of a recipe after which ``check`` finds fault, or None when it never does.

    Every pass runs once; the check runs about log2(number of passes) times, on the assumption that what is broken stays
    broken. Without a check, outputs on the example inputs are held to what the passes promise.

    Args:
        model: a model, or a ``Program`` (whose own example is used where no inputs are given).
        example_inputs: a tensor, a tuple (positional) or a dict (keyword), as for ``optimize``.
        recipe: a name, a pass, or a sequence of them.
        check: takes a program; gives None where it is well, or what is wrong with it.

    Raises:
        InputError: the program is broken before any pass, or there is neither check nor example.
    """
    from graphwright.passes.pipeline import resolve

    passes, program = resolve(recipe), _captured(model, example_inputs)
    check = check or _numbers(program, passes)
    if problem := check(program):
        raise InputError(f"the check fails before any pass: {problem}", where="bisect")
    states, results = [program], []
    for p in passes:
        after = states[-1].copy()
        try:
            results.append(p.run(after))
            after.verify()
        except InternalError as error:
            return Culprit(len(states) - 1, p.name, error.what, states[-1], after, PassResult())
        states.append(after)
    problems = {len(states) - 1: check(states[-1])}
    if problems[len(states) - 1] is None:
        return None
    good, bad = 0, len(states) - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        problems[middle] = check(states[middle])
        good, bad = (middle, bad) if problems[middle] is None else (good, middle)
    return Culprit(bad - 1, passes[bad - 1].name, str(problems[bad]), states[bad - 1], states[bad], results[bad - 1])


def _captured(model: nn.Module, example_inputs: Any) -> Program:
    from graphwright.capture import capture
    from graphwright.structure import flatten_call

    if isinstance(model, Program) and example_inputs is None:
        return model
    if example_inputs is None:
        raise InputError(
            "example_inputs are missing", where="bisect", hint="Pass them as for optimize: a tensor, a tuple or a dict."
        )
    keyword = dict(example_inputs) if isinstance(example_inputs, Mapping) else {}
    args = () if keyword else example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    leaves = tuple(flatten_call(args, keyword)[0])
    program = model.copy() if isinstance(model, Program) else capture(model, args, keyword).program
    if program is None:
        raise InputError("the model could not be captured as a whole", where="bisect")
    program.example = leaves
    return program


def _numbers(program: Program, passes: Sequence[Pass]) -> Check:
    """Outputs stay as near to float64 as the most lenient of the passes promises."""
    leaves = program.example
    if leaves is None:
        raise InputError(
            "there is nothing to compare outputs on",
            where="bisect",
            hint="Pass a check, or capture with example inputs.",
        )
    before = run_pure(program, leaves)
    try:
        reference = run_double(program, leaves)
    except RuntimeError:  # an op without a float64 kernel
        reference = before
    promises = [p.numerics for p in passes]
    promise = next((n for n in promises if str(n) == "lossy"), promises[0] if promises else Pass.numerics)

    def check(now: Program) -> str | None:
        for k, (ref, was, value) in enumerate(zip(reference, before, run_pure(now, leaves), strict=True)):
            if isinstance(was, Tensor) and (problem := promise.failure(ref, was, value)):
                return f"output {k}: {problem}"
        return None

    return check
