"""Where lowering may compute in bfloat16 or float16: site by site, by the error that each makes there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphwright.accelerator import random_devices
from graphwright.errors import RecipeError, nearest
from graphwright.ir import Program, site_of
from graphwright.manager import Pass, PassResult
from graphwright.numerics import Lossy
from graphwright.passes._halves import NAMES, WORDS, Measured, barred, computes, moves

#: Batches that errors are measured on, the example apart.
_BATCHES = 2


@dataclass(frozen=True)
class AllowHalf(Pass):
    """Let lowering compute in bfloat16 or float16 where that measures faster, at the sites where its error stays small.

    Every op that may be offered a kernel in half precision is run in each dtype (arguments, weights and result rounded, sums in
    float32) on the values that it reads in the model, for the example and the first calibration batches. A dtype whose result falls
    below ``floor_db`` against float32, or leaves its range where float32 does not (float16 ends at 65504, and has few bits below
    6e-5), is not offered at that site; where none is left the site keeps float32, and the reason is told with the figure. Ops of any
    kind are also run on rounded arguments alone: where that loses too much, what they read is not held in that dtype either. Among the
    dtypes that are left the stopwatch chooses, conversions between neighbours included; constants are converted ahead. The pass
    wants to stand last: what later passes put into the place of a measured op has not been measured.

    Args:
        dtypes: ``"bf16"``, ``"fp16"`` or both.
        floor_db: SQNR that each op must reach by itself, in dB. Rounding to bfloat16 alone gives some 50, to float16 some 70; what is
            lost beyond that is cancellation, or numbers that 8 or 11 bits can't tell apart.
    """

    name: ClassVar[str] = "allow-half"
    numerics: ClassVar[Lossy] = Lossy(5.0)

    dtypes: tuple[str, ...] = ("bf16", "fp16")
    floor_db: float = 30.0

    def __post_init__(self) -> None:
        given = (self.dtypes,) if isinstance(self.dtypes, str) else tuple(self.dtypes)
        object.__setattr__(self, "dtypes", given)
        wrong = next((d for d in given if d not in NAMES), None)
        if wrong is not None or not given:
            hint = (nearest(wrong, NAMES) if isinstance(wrong, str) else None) or "'bf16', 'fp16' or both"
            raise RecipeError(f"AllowHalf(dtypes={self.dtypes!r}): {f'{wrong!r} is' if given else 'there is'} no half precision", hint=hint)
        if not isinstance(self.floor_db, (int, float)) or math.isnan(self.floor_db):
            raise RecipeError(f"AllowHalf(floor_db={self.floor_db!r}): a number of decibels is wanted")

    @property
    def precisions(self) -> frozenset[str]:
        """What lowering may choose among, beside float32."""
        return frozenset(self.dtypes)

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        if program.example is None:
            result.notes.append(f"there is no example to measure on: {_listed(self.dtypes)} is allowed where it measures faster")
            return result
        wanted = [n for n in program.nodes if computes(n) and not self.refused(result, n)]
        measured = [Measured(program, name, set(wanted)) for name in self.dtypes]
        with torch.no_grad(), torch.random.fork_rng(devices=random_devices()):
            for leaves in itertools.islice([program.example, *program.calibration], _BATCHES + 1):
                for each in measured:
                    torch.manual_seed(0)
                    each.run(*leaves)
        for node in program.nodes:
            _mark(node, {}, {})
        for each in measured:
            because = barred(each, self.floor_db)
            for node in program.nodes:
                if node in each.wanted or moves(node):
                    why = each.reason(node, self.floor_db) or because.get(node)
                    if why is None:
                        node.meta["halves"][each.name] = each.worst.get(node, math.inf)
                    else:
                        node.meta["halves_barred"][each.name] = why
        for node in wanted:
            if not node.meta["halves"]:
                result.refuse(site_of(node), "; ".join(dict.fromkeys(node.meta["halves_barred"].values())))
        result.notes.append(self._note(wanted))
        return result

    def _note(self, wanted: Sequence[fx.Node]) -> str:
        kept = [n for n in wanted if n.meta["halves"]]
        worst = min(((db, kind, n) for n in kept for kind, db in n.meta["halves"].items()), key=lambda w: w[0], default=None)
        least = f"; least SQNR {worst[0]:.1f} dB, in {WORDS[worst[1]]} at {site_of(worst[2])}" if worst is not None else ""
        each = ", ".join(f"{WORDS[d]} at {sum(d in n.meta['halves'] for n in kept)}" for d in self.dtypes)
        return f"half precision is allowed at {len(kept)} of {len(wanted)} float32 ops ({each}), where it measures faster{least}"


def _mark(node: fx.Node, admitted: dict[str, float], reasons: dict[str, str]) -> None:
    """Beside what an earlier pass of this kind found for other dtypes."""
    node.meta["halves"] = {**node.meta.get("halves", {}), **admitted}
    node.meta["halves_barred"] = {**node.meta.get("halves_barred", {}), **reasons}


def _listed(dtypes: Sequence[str]) -> str:
    return " or ".join(WORDS[d] for d in dtypes)
