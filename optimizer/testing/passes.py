"""The check of a pass: on many programs, does it keep what every pass promises?"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphwright.errors import CheckError, GraphwrightError, InputError
from graphwright.ir import Program, sites_of
from graphwright.manager import Pass, PassResult, Pipeline, fingerprint
from graphwright.testing.models import program_of
from graphwright.testing.models import programs as built_in


@dataclass(frozen=True)
class Checked:
    """What came of ``check_pass``.

    Attributes:
        programs: how many were tried.
        changed: what was changed, by program.
        refused: what was declined, by program.
    """

    programs: int
    changed: dict[str, tuple[tuple[str, str], ...]]
    refused: dict[str, tuple[tuple[str, str], ...]]

    def __str__(self) -> str:
        lines = [f"{self.programs} programs, changed {len(self.changed)}"]
        lines += [f"  {name}: {site}: {what}" for name, changes in self.changed.items() for site, what in changes]
        return "\n".join(lines)


def check_pass(pass_: Pass, programs_or_models: Any = None, *, patterns: bool = True, seed: int = 0) -> Checked:
    """Run a pass over programs and hold it to what every pass promises.

    On each program: the result is well formed, its numbers keep to ``pass_.numerics``, ``modified`` is true to what was
    done, the program that it was given stays as it was, the same comes out twice, a second run finds nothing to do (or says why in
    its notes), and sites that include / exclude leave out are left alone.

    Args:
        programs_or_models: a ``gw.Program`` with ``example``, ``(model, inputs)``, or a list or dict of these; inputs are a tensor or a
            tuple of them. None: two dozen built-in programs, half of them random graphs.
        patterns: also check include / exclude; for passes that honour them.
        seed: of the random graphs.

    Returns:
        What was changed and declined. A warning says so where the pass changed nothing anywhere: nothing was tested then.

    Raises:
        CheckError: a promise is broken; names each program and the promise.
        InputError: something is no pass, program or model.
    """
    if not isinstance(pass_, Pass):
        hint = f"Write {pass_.__name__}()." if isinstance(pass_, type) else "Pass an instance of a gw.Pass."
        raise InputError(f"{pass_!r} is no pass", where="check_pass", hint=hint)
    changed, refused, failures = {}, {}, []
    several = _programs(programs_or_models, seed)
    for name, program in several.items():
        try:
            result = _check(pass_, program, patterns)
        except GraphwrightError as error:
            failures.append(f"{name}: {error.what}" + (f" ({error.where})" if error.where else ""))
            continue
        if result.modified:
            changed[name] = tuple(result.changes) or (("the program", "changed"),)
        if result.refusals:
            refused[name] = tuple(result.refusals)
    if failures:
        raise CheckError(f"{len(failures)} of {len(several)} programs fail" + "".join(f"\n    {f}" for f in failures), where=f"pass {pass_.name}")
    if not changed:
        warnings.warn(f"pass {pass_.name} changed none of {len(several)} programs: pass check_pass some that it applies to", stacklevel=2)
    return Checked(len(several), changed, refused)


def _programs(given: Any, seed: int) -> Mapping[str, Program]:
    if given is None:
        return built_in(seed)
    if isinstance(given, Mapping):
        return {str(name): _program(g) for name, g in given.items()}
    if isinstance(given, Program) or (isinstance(given, tuple) and given and isinstance(given[0], nn.Module)):
        return {"the program": _program(given)}
    if not isinstance(given, Iterable):
        return {"the program": _program(given)}
    return {f"program {k}": _program(g) for k, g in enumerate(given)}


def _program(given: Any) -> Program:
    if isinstance(given, Program):
        if given.example is None:
            raise InputError("a program without an example", where="check_pass", hint="Set program.example to a tuple of flat inputs.")
        return given
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], nn.Module):
        inputs = given[1] if isinstance(given[1], (tuple, list)) else (given[1],)
        if all(isinstance(x, Tensor) for x in inputs):
            return program_of(given[0], tuple(inputs))
    raise InputError(f"a {type(given).__name__} is no program", where="check_pass", hint="Pass a gw.Program, or (model, inputs) with tensors.")


def _fail(what: str) -> None:
    raise CheckError(what)


def _check(p: Pass, program: Program, patterns: bool) -> PassResult:
    before = fingerprint(program)
    after, result = _run(p, program)
    if fingerprint(program) != before:
        _fail("the program that it was given is changed: it writes into tensors")
    again, second = _run(p, program)
    if again.text() != after.text() or second.changes != result.changes:
        _fail("two runs on the same program give two results")
    settled, more = _run(p, after)
    if more.modified and not more.notes:
        done = ", ".join(f"{site}: {what}" for site, what in more.changes[:3]) or "the program"
        _fail(f"a second run changes more ({done}) and its notes don't say why")
    del settled
    if patterns and result.changes:
        _check_patterns(p, program, after, result)
    return result


def _run(p: Pass, program: Program) -> tuple[Program, PassResult]:
    after, (record,) = Pipeline((p,), strict=True).run(program)
    return after, record.result


def _check_patterns(p: Pass, program: Program, after: Program, result: PassResult) -> None:
    """Nothing happens where everything is left out, and where one site is asked for, nothing elsewhere."""
    _, none = _run(dataclasses.replace(p, include=(), exclude=("*",)), program)
    if none.modified:
        where = ", ".join(site for site, _ in none.changes[:3]) or "the program"
        _fail(f"exclude='*' is not honoured: it changes {where}. Ask self.refused(result, node) before a node is touched")
    together = [set(sites_of(n)) for q in (program, after) for n in q.nodes]
    known = set(program.sites())
    for site in list(dict.fromkeys(s for s, _ in result.changes if s in known))[:3]:
        escaped = site.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")
        _, some = _run(dataclasses.replace(p, include=(escaped,), exclude=()), program)
        for other, _ in some.changes:
            if other != site and other in known and not any({site, other} <= group for group in together):
                _fail(f"include={site!r} is not honoured: it changes {other}")
