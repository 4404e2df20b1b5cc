"""What passes are held to: the numbers of the program before them, in float64 and as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphwright.ir import Program
from graphwright.numerics import Exact, Lossy, run_double, run_pure, sqnr_db
from graphwright.snapshot import Snapshot


class Oracle:
    """What the program gave before any pass, and what an exact pass must keep to: in float64, and as it is.

    Attributes:
        original: the captured program's outputs in float64: what lossy passes, and the report, measure against.
        reference, before: float64 and own outputs of the last program whose numbers were allowed to change; after a lossy
            pass the float64 ones are computed once an exact pass has something to be held to.
    """

    def __init__(self, program: Program):
        self.leaves = program.example
        self.before = run_pure(program, self.leaves)
        self.original = self.reference = self._double(program)

    def _double(self, program: Program) -> tuple[Any, ...]:
        try:
            return run_double(program, self.leaves)
        except RuntimeError:  # an op without a float64 kernel: the program's own numbers are the reference
            return self.before

    def rebase(self, outputs: tuple[Any, ...]) -> None:
        """Hold exact passes to the program that gave ``outputs`` from here on: a lossy pass was accepted."""
        self.before, self.reference = outputs, None

    def compare(self, program: Program, numerics: Exact | Lossy, accepted: Program | Snapshot) -> tuple[float, str | None, tuple[Any, ...]]:
        """Worst SQNR of the outputs in dB against the original, the first failure, and the outputs.

        Args:
            accepted: the program before the pass.
        """
        worst, failure = float("inf"), None
        try:
            after = run_pure(program, self.leaves)
        except Exception as error:  # noqa: BLE001  whatever a pass has made of the program: it is put back
            return -worst, f"the program no longer runs: {type(error).__name__}: {error}", ()
        if self.reference is None and isinstance(numerics, Exact):
            self.reference = self._double(accepted if isinstance(accepted, Program) else accepted.restore())  # nothing was accepted since the lossy pass: an exact one would have asked
        reference = self.reference if isinstance(numerics, Exact) else self.original
        for k, (ref, origin, was, now) in enumerate(zip(reference, self.original, self.before, after, strict=True)):
            if not isinstance(was, Tensor):
                continue
            problem = numerics.failure(ref, was, now)
            if problem and failure is None:
                failure = f"output {k}: {problem}"
            if was.is_floating_point() and now.shape == was.shape:
                worst = min(worst, sqnr_db(origin.double().nan_to_num(), now.double().nan_to_num()))
        return worst, failure, after

    def first_bad(self, before: Program, after: Program, numerics: Exact | Lossy) -> str:
        """The first node, by site, whose value is beyond the check although its site exists in both programs."""
        was, now = _values(before, self.leaves), _values(after, self.leaves)
        for site, value in now.items():
            if site in was and isinstance(value, Tensor) and numerics.failure(was[site].double() if was[site].is_floating_point() else was[site], was[site], value):
                return site
        return "unknown (only the outputs differ)"


def _values(program: Program, leaves: Sequence[Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor):
                for site in n.meta.get("sites") or ():
                    found[site] = value
            return value

    with torch.no_grad():
        Recorder(program.graph_module, garbage_collect_values=False).run(*leaves)
    return found
