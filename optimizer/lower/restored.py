"""Regions of a saved file, taken again: what can't be had runs as a chain, with a note that says what it costs.

    lowered = restored(lowered, saved)                 # what a file says was taken; times nothing
"""

from __future__ import annotations

import dataclasses
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.accelerator import device_of
from graphwright.backends import inductor
from graphwright.backends.inductor import Fragment, NotCompiled
from graphwright.errors import InternalError
from graphwright.kernels.trees import Unfit
from graphwright.lower import Lowered, pairs, spaces
from graphwright.lower.chains import bind, chain, eligible, fragment_of
from graphwright.lower.graph import Region, schedule
from graphwright.lower.regions import call_of, choices, forms, made, noted, sound_region
from graphwright.lower.runner import Fused, emit
from graphwright.lower.stopwatch import FLOORS_DB
from graphwright.numerics import sqnr_db

#: seconds that a compilation at the first call after ``load`` may take
_PATIENCE_S = 300.0


def restored(lowered: Lowered, saved: Any) -> Lowered:
    """``lowered`` with the regions that a file names; what does not fit or can't be had runs as a chain, with a note."""
    chosen = dict(zip(lowered.analysis.works, lowered.chosen, strict=True))
    by_name = {w.node.name: w for w in lowered.analysis.works}
    who = spaces.maker(device_of(lowered.analysis.program))
    fused: list[Fused] = []
    kept, notes = [], []
    late = 0
    for entry in saved if isinstance(saved, list) else []:
        try:
            works = [by_name[name] for name in entry["nodes"]]
            cost = float(entry["chain_ms"]) - float(entry["ms"])
            region = Region.of(lowered.analysis, sorted(works, key=lowered.analysis.works.index))
            ours, shapes = entry.get("maker") in ("llvm", "triton", pairs.MAKER), entry.get("shapes")
            maker = pairs.MAKER if entry.get("maker") == pairs.MAKER else who
            fits = pairs.serves(region.works, chosen) if maker == pairs.MAKER else all(eligible(w, chosen[w][0], free=ours) for w in works)
            if not works or not math.isfinite(cost) or not fits or not sound_region(region, entry["strides"], shapes):
                raise ValueError("its ops or strides may not be those of a region")
            fragment, constants = fragment_of(region, entry["strides"], shapes)
            schedule(lowered.analysis, [*(f.region for f in fused), region])
        except (KeyError, TypeError, ValueError, AttributeError, InternalError) as error:
            notes.append(f"a region that the file names does not fit the program ({error}); its ops run one by one")
            continue
        if ours:
            try:
                call = call_of(region, fragment, constants, made(fragment, maker), chosen)
            except Unfit as error:
                notes.append(f"{region.head.site}: no kernel can be generated for its region here ({error}); its {len(works)} ops run one by one, "
                             f"which took {max(cost, 0.0):.2g} ms longer where it was measured")  # fmt: skip
                continue
            fused.append(Fused(region, f"{maker}.region{len(fused) + 1}", call, True, *forms(region, chosen)))
            kept.append(entry)
            continue
        run, why = inductor.open_library(fragment), inductor.reason()
        if run is None and why:
            notes.append(f"{region.head.site}: the library of its region is not in this machine's cache and {why}; "
                         f"its {len(works)} ops run one by one, which took {max(cost, 0.0):.2g} ms longer where it was measured")  # fmt: skip
            continue
        late += run is None
        call = bind(fragment, constants, run) if run is not None else _Late(fragment, constants, chain(region, chosen), region.head.site)
        fused.append(Fused(region, f"inductor.region{len(fused) + 1}", call))
        kept.append(entry)
    if late:
        notes.append(f"{late} regions are compiled at the first call, about {inductor.expected_seconds():.0f} s for each different one: "
                     "their libraries are not in this machine's cache")  # fmt: skip
    if not fused:
        return noted(lowered, notes)
    runner = emit(lowered.analysis, lowered.chosen, fused)
    return dataclasses.replace(noted(lowered, notes), runner=runner, choices=choices(lowered, fused), regions=kept, fused=fused)


class _Late:
    """A region whose library is made at the first call; its chain where that fails."""

    _lock = threading.Lock()

    def __init__(self, fragment: Fragment, constants: list[Tensor], plain: Callable[..., Any], site: str):
        self._fragment, self._constants, self._plain, self._site = fragment, constants, plain, site
        self._call: Callable[..., Any] | None = None

    def __call__(self, *reads: Tensor) -> Any:
        if self._call is None:
            with self._lock:
                self._call = self._call or self._made(reads)
        return self._call(*reads)

    def _made(self, reads: Sequence[Tensor]) -> Callable[..., Any]:
        try:
            if inductor.open_library(self._fragment) is None:
                warnings.warn(f"{self._site}: a region is compiled now, which takes about {inductor.expected_seconds():.0f} s, once on this machine", stacklevel=2)
                inductor.compile_library(self._fragment, _PATIENCE_S)
            run = inductor.open_library(self._fragment)
            if run is None:
                raise NotCompiled("its library cannot be opened")
            call = bind(self._fragment, self._constants, run)
            for wanted, got in zip(_list(self._plain(*reads)), _list(call(*reads)), strict=True):
                same = sqnr_db(wanted.nan_to_num(), got.nan_to_num()) >= FLOORS_DB["f32"] if wanted.is_floating_point() else torch.equal(wanted, got)
                if not same:
                    raise NotCompiled("Inductor's code is not right here")
            return call
        except (NotCompiled, RuntimeError) as error:
            warnings.warn(f"{self._site}: the region was not compiled ({error}); its ops run one by one", stacklevel=2)
            return self._plain


def _list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
