"""Passes and the pipeline that runs them: verifies, checks numbers, times, and keeps what each pass did or declined."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import fx

from graphwright.errors import GraphwrightError, InternalError, PassError, RecipeError, SiteError, nearest
from graphwright.ir import Program, site_of
from graphwright.memory import release
from graphwright.numerics import Exact, Lossy
from graphwright.oracle import Oracle
from graphwright.snapshot import Snapshot

#: A character of patterns that stands for itself: ``[*]``.
_ESCAPED = re.compile(r"\[([*?\[])\]")


@dataclass
class PassResult:
    """What one pass did.

    Attributes:
        changes: ``(site, what was done)``.
        refusals: ``(site, reason)``: what fits the pass's purpose but was left alone.
        notes: anything about the program as a whole.
        touched: set where the program was changed without a site to name.
    """

    changes: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    touched: bool = False

    @property
    def modified(self) -> bool:
        return self.touched or bool(self.changes)

    def change(self, site: str, what: str) -> None:
        self.changes.append((site, what))

    def refuse(self, site: str, reason: str) -> None:
        self.refusals.append((site, reason))


@dataclass(frozen=True)
class Origin:
    """The plug-in that a pass comes from.

    Attributes:
        distribution: the installed package and its version: ``"faster-relu 1.2"``.
        asked: the user named or gave the pass; else it joined the default pipeline by itself, and what it breaks is undone.
    """

    distribution: str
    asked: bool = True


@dataclass(frozen=True)
class Pass:
    """Base of every pass: a frozen dataclass whose fields are its options.

    Class attributes:
        name: how recipes and the command line call it.
        numerics: ``Exact()`` or ``Lossy(floor_db)``: the check that the manager applies.

    Args:
        include: site patterns (``fnmatch``); only these sites are considered. Empty: all.
        exclude: site patterns that are left alone.
        origin: set by Graphwright where a plug-in brought the pass.
    """

    name: ClassVar[str] = ""
    numerics: ClassVar[Exact | Lossy] = Exact()

    include: tuple[str, ...] = field(default=(), kw_only=True)
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    origin: Origin | None = field(default=None, kw_only=True, repr=False, compare=False)

    def run(self, program: Program) -> PassResult:
        """Rewrite ``program`` in place. ``program.example`` holds flat inputs, ``program.calibration`` batches of them."""
        raise InternalError(f"pass {type(self).__name__} does not define run")

    def selects(self, sites: Iterable[str]) -> bool:
        """Whether this pass may touch a node that stands for these sites."""
        sites = tuple(sites)
        wanted = not self.include or any(map(matcher(patterns(self.include)), sites))
        return wanted and not any(map(matcher(patterns(self.exclude)), sites))

    def refused(self, result: PassResult, node: fx.Node) -> bool:
        """Record a refusal where include / exclude leave ``node`` out; True when they do."""
        sites = node.meta.get("sites") or (node.name,)
        if self.selects(sites):
            return False
        result.refuse(site_of(node), "left out by include / exclude")
        return True

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "origin"}

    @property
    def guest(self) -> bool:
        """It comes from a plug-in, and the user has not asked for it."""
        return self.origin is not None and not self.origin.asked

    @classmethod
    def summary(cls) -> str:
        """The docstring's first line."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0]


def patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    """Site patterns as a tuple; one string is one pattern."""
    return (value,) if isinstance(value, str) else tuple(value)


@functools.lru_cache(maxsize=64)
def matcher(several: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a site matches one of several ``fnmatch`` patterns; thousands of plain or escaped names cost one look-up."""
    names, wild = set(), []
    for pattern in several:
        plain = _ESCAPED.sub("", pattern)
        if any(c in plain for c in "*?["):
            wild.append(fnmatch.translate(pattern))
        else:
            names.add(_ESCAPED.sub(r"\1", pattern))
    expression = re.compile("|".join(wild)) if wild else None
    return lambda site: site in names or (expression is not None and expression.match(site) is not None)


def check_patterns(passes: Iterable[Pass], *programs: Program) -> None:
    """Every include / exclude pattern matches a site of one of the programs.

    Raises:
        SiteError: one matches nothing; names the nearest sites.
        RecipeError: an option holds something else than patterns.
    """
    sites = list(dict.fromkeys(s for program in programs for s in program.sites()))
    for p in passes:
        for option in ("include", "exclude") if not p.guest else ():
            value = getattr(p, option)
            if not isinstance(value, Iterable) or not all(isinstance(x, str) for x in value):
                raise RecipeError(f"{value!r} is no site pattern", where=f"{p.name}({option}=...)",
                                  hint="Pass a string such as 'encoder.layer.0.*', or a tuple of strings.")  # fmt: skip
            for pattern in patterns(value):
                if not any(fnmatch.fnmatchcase(s, pattern) for s in sites):
                    hint = nearest(pattern, sites) or f"the model's sites are {', '.join(sites[:8])}{', …' if len(sites) > 8 else ''}"
                    raise SiteError(f"pattern {pattern!r} matches no site", where=f"{p.name}({option}=...)", hint=hint)


def narrowed(passes: Iterable[Pass], program: Program) -> list[Pass]:
    """The passes for one of several programs: without the patterns that match in others only, and without passes that are left nothing."""
    sites, found = list(program.sites()), []
    for p in passes:
        if p.include or p.exclude:
            here = {o: tuple(x for x in patterns(getattr(p, o)) if any(fnmatch.fnmatchcase(s, x) for s in sites)) for o in ("include", "exclude")}
            if p.include and not here["include"]:
                continue
            p = replace(p, **here)
        found.append(p)
    return found


@dataclass
class PassRecord:
    """One line of the report: what a pass did to the program.

    Attributes:
        error: worst SQNR of the outputs against float64, in dB, after the pass; None where nothing changed.
        undone: why the pass's work was thrown away; None where it was kept.
    """

    name: str
    numerics: str
    result: PassResult
    seconds: float
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    error: float | None = None
    undone: str | None = None


def fingerprint(program: Program) -> str:
    """Hash of the graph's text and of the identity and version of its tensors."""
    parts = [program.text()]
    parts += [f"{n}:{t.data_ptr()}:{t._version}:{t.dtype}:{tuple(t.shape)}" for n, t in sorted(program.tensors().items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass
class _State:
    """Where a run stands.

    Attributes:
        kept: what the program was after the last pass that was accepted: to see what the next one changes, and to go back.
        size: bytes of its tensors.
        unchecked: whether anything changed since every invariant was checked at every node.
    """

    program: Program
    kept: Snapshot
    size: int
    unchecked: bool = False


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Args:
        passes: what to run.
        strict: a pass that fails its numerics check raises; otherwise its work is undone and the record says why.
    """

    passes: tuple[Pass, ...]
    strict: bool = False

    def run(self, program: Program, *, progress: Callable[[str], None] | None = None) -> tuple[Program, list[PassRecord]]:
        """Run every pass on a copy of ``program``.

        ``program.example`` (flat inputs) feeds the numerics check; without it only the structure is checked.

        Returns:
            The new program and a record per pass.

        Raises:
            PassError: a pass broke an invariant, misreported ``modified``, or (strict) its numbers.
            SiteError: a pattern matches nothing.
        """
        check_patterns(self.passes, program)
        twin = program.copy()
        state, records = _State(twin, Snapshot.of(twin), twin.size_bytes()), []
        oracle = Oracle(program) if program.example is not None else None
        for p, following in itertools.zip_longest(self.passes, self.passes[1:]):
            if progress:
                progress(f"pass {p.name}")
            before = [r.name for r in records]
            records.append(self._step(p, state, oracle, before))
            if state.unchecked and (following is None or type(following.numerics) is not type(p.numerics)):
                self._verify(program, state, [*before, p.name])
        state.program.recompile()
        return state.program, records

    def _verify(self, given: Program, state: _State, done: list[str]) -> None:
        """Every invariant at every node, where exact passes end, lossy ones end, and at the end of all."""
        where = f"after the passes {', '.join(done)}"
        try:
            state.program.verify()
        except InternalError as error:
            try:
                given.verify()
            except InternalError:
                where = "the program that the passes were given"
            raise PassError(f"the program is broken: {error.what}", where=where, hint=error.program) from error
        state.unchecked = False

    def _step(self, p: Pass, state: _State, oracle: Oracle | None, before: list[str]) -> PassRecord:
        """Run one pass; a plug-in's that nobody asked for is undone where it fails."""
        if not p.guest or self.strict:
            return self._attempt(p, state, oracle, before)
        start, nodes, size = time.perf_counter(), len(state.program.nodes), state.size
        try:
            return self._attempt(p, state, oracle, before)
        except Exception as error:
            if not state.kept.intact():
                raise PassError(f"the plug-in wrote into the program's tensors and then failed: {error}", where=_where(p, before),
                                hint="Uninstall it, or have it make new tensors.") from error  # fmt: skip
            state.program = state.kept.restore()
            state.kept = Snapshot.of(state.program)
            said = error.what if isinstance(error, PassError) else f"{type(error).__name__}: {error}"
            return PassRecord(p.name, str(p.numerics), PassResult(), time.perf_counter() - start, nodes, nodes, size, size,
                              undone=f"left out: a plug-in of {p.origin.distribution if p.origin else '?'} that failed ({said})")  # fmt: skip

    def _attempt(self, p: Pass, state: _State, oracle: Oracle | None, before: list[str]) -> PassRecord:
        program, nodes, size, start = state.program, len(state.program.nodes), state.size, time.perf_counter()
        where = _where(p, before)
        try:
            result = p.run(program)
            now = Snapshot.of(program, state.kept)
            difference = now.since(state.kept)
            if difference.modified:
                program.verify(difference.nodes)
        except InternalError as error:
            raise PassError(f"the program is broken: {error.what}", where=where, hint=error.program) from error
        except GraphwrightError as error:  # bad options or data: its words are the user's answer
            if p.origin is None:
                raise
            raise PassError(str(error), where=where) from error
        except Exception as error:
            raise PassError(f"the pass failed: {type(error).__name__}: {error}", where=where) from error
        if not isinstance(result, PassResult):
            raise PassError(f"run() returned {type(result).__name__}, not a PassResult", where=where)
        if not all(isinstance(e, tuple) and len(e) == 2 and all(isinstance(x, str) for x in e) for e in (*result.changes, *result.refusals)):
            raise PassError("changes and refusals are not all (site, words)", where=where, hint="Record them by result.change(site, what) and result.refuse(site, reason).")
        if result.modified != difference.modified:
            said = "says that it changed the program, and it did not" if result.modified else "changed the program and does not say so"
            raise PassError(f"the pass {said}", where=where, hint="Record every change in PassResult.changes, or set touched.")
        error, undone = None, None
        if result.modified and oracle is not None:
            error, failure, outputs = oracle.compare(program, p.numerics, state.kept)
            if failure and self.strict:
                first = oracle.first_bad(state.kept.restore(), program, p.numerics)
                raise PassError(failure, where=where, hint=f"First bad node: {first}")
            if failure:
                undone = f"undone: {failure}" + (f" (a plug-in of {p.origin.distribution})" if p.origin else "")
                result = PassResult(refusals=[(s, undone) for s, _ in result.changes] + result.refusals, notes=result.notes)
                program = state.program = state.kept.restore()
                now = Snapshot.of(program)
            elif isinstance(p.numerics, Lossy):
                oracle.rebase(outputs)
        state.kept = now
        if result.modified and not undone:
            state.size, state.unchecked = program.size_bytes(), True
            release()
        return PassRecord(p.name, str(p.numerics), result, time.perf_counter() - start, nodes, len(program.nodes),
                          size, state.size, error, undone)  # fmt: skip


def _where(p: Pass, before: Sequence[str]) -> str:
    """A pass, the plug-in that it comes from, and its predecessors."""
    return f"pass {p.name}" + (f" of {p.origin.distribution}" if p.origin else "") + (f" (after {', '.join(before)})" if before else "")
