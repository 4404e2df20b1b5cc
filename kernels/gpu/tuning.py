"""Which config a call runs under: ranked by a model, the first few timed, the winner remembered.

A choice holds for a *bucket* of calls (``Family.bucket``: sizes that vary from call to call are rounded), one GPU, one version
of Triton and one state of the kernel's source. It is looked for in this process, in the cache on disk, and in the files that
are shipped (``tuned/``); where none of them knows, the best few configs by ``predict`` are timed within ``SECONDS``, except
while a CUDA graph is being captured and within ``frozen()``: there the first of the ranking is taken, and not remembered.

    python -m graphwright.kernels.gpu.tuning [kernels ...]      tune for the shapes of the microbenchmark, and write the shipped file
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import triton

from graphwright import cache
from graphwright.errors import InternalError
from graphwright.kernels import gpu
from graphwright.kernels.gpu import machine
from graphwright.kernels.gpu.launch import Config, Estimate, Family, cdiv
from graphwright.kernels.gpu.machine import Gpu

#: How many configs of a ranking are timed, and for how long in all (compiling included) before the best so far is taken.
FEW, SECONDS = 6, float(os.environ.get("GRAPHWRIGHT_TUNE_SECONDS", "20"))

#: Where the shipped choices lie.
TUNED = Path(__file__).parent / "tuned"

#: Seconds: a launch, the way from device memory to a processor, and what a matrix unit needs to turn round.
_LAUNCH, _LATENCY, _TURN = 3e-6, 8e-7, 4e-8

_frozen: ContextVar[bool] = ContextVar("frozen", default=False)
_chosen: dict[tuple[Any, ...], Config] = {}


@contextmanager
def frozen() -> Iterator[None]:
    """Within, nothing is timed: for regions that are timed themselves."""
    token = _frozen.set(True)
    try:
        yield
    finally:
        _frozen.reset(token)


def choose(family: Family, args: Sequence[Any]) -> Config:
    """The config for a call with these arguments.

    Raises:
        InternalError: none fits; ``Family.refuses`` would have told.
    """
    found = machine.here()
    if found is None:
        return _for_interpreter(family, args)
    short = (family.name, found.name, family.bucket(*args))
    if (known := _chosen.get(short)) is not None and family.fits(known, *args) is None:
        return known
    ranked, key = rank(family, args, found), _key(family, found.name, short[-1])
    if (stored := _stored(key, found.name)) is not None:
        match = next((c for c in ranked if str(c) == stored), None)
        if match is not None:
            _chosen[short] = match
            return match
    if _frozen.get() or torch.cuda.is_current_stream_capturing():
        return ranked[0]
    _chosen[short] = best = fastest(family, args, ranked[:FEW])
    _cache().put(key, str(best))
    _cache().flush()
    return best


def remembered(family: Family, args: Sequence[Any]) -> tuple[str, str]:
    """The choice for a call with these arguments, and under which key the files in ``tuned/`` hold it. Where there is a GPU."""
    found = machine.here()
    if found is None:
        raise InternalError("there is no GPU to choose for")
    return _key(family, found.name, family.bucket(*args)), str(choose(family, args))


def _for_interpreter(family: Family, args: Sequence[Any]) -> Config:
    """The config with the fewest turns of the interpreter."""
    fitting = _fitting(family, args)
    guesses = [family.estimate(c, *args) for c in fitting]
    return min(zip(fitting, guesses, strict=True), key=lambda pair: pair[1].programs * (1 + pair[1].steps))[0]


def _fitting(family: Family, args: Sequence[Any]) -> list[Config]:
    found = [c for c in family.configs if family.fits(c, *args) is None]
    if not found:
        raise InternalError(f"no config of {family.name} fits: {family.fits(family.configs[0], *args)}")
    return found


def rank(family: Family, args: Sequence[Any], found: Gpu) -> list[Config]:
    """The configs that fit, best guess first. Those that the record of machine code holds something against come not at all."""
    from graphwright.kernels.gpu import ahead

    fitting = _fitting(family, args)
    sound = [c for c in fitting if ahead.pruned(family.name, c, found.target) is None] or fitting
    return sorted(sound, key=lambda c: predict(c, family.estimate(c, *args), found))


def predict(config: Config, work: Estimate, found: Gpu) -> float:
    """Seconds that a launch is expected to take: the largest of what its parts take, and the launch itself.

    Programs come in waves of as many as the processors hold; the last wave is as long as any other. A program's loop waits for
    memory once per turn, less what the pipeline's stages hide.
    """
    programs = max(work.programs, 1)  # of an empty batch there are none
    together = max(1, min(found.threads // (32 * config.warps), found.shared // max(work.shared, 1), 16))
    waves = cdiv(programs, found.processors * together)
    # The last wave: as many programs at a time as are left, each processor working on its own.
    last = programs - (waves - 1) * found.processors * together
    busy = (waves - 1) + cdiv(last, found.processors) / together
    used = programs / max(busy * found.processors * together, 1e-9)
    compute = work.ops / found.rate(work.unit) / max(min(used, 1.0), 1e-6)
    # Memory keeps up only where enough of it is asked for at a time: half of the processors saturate it.
    asking = min(1.0, 2 * programs / found.processors)
    dram, l2 = work.dram / found.dram / asking, work.l2 / found.l2 / asking
    waiting = waves * work.steps * max(_LATENCY / max(config.stages, 1), _TURN)
    return max(compute, dram, l2, waiting) + _LAUNCH + 0.1 * (compute + dram + l2 + waiting)


def fastest(family: Family, args: Sequence[Any], configs: Sequence[Config], clock: Callable[[Callable[[], Any]], float] | None = None) -> Config:
    """The config that measures fastest on these arguments; the first of those that run, where time is up before any was timed.

    Raises:
        InternalError: not one of them runs.
    """
    clock = clock or _milliseconds
    begin, times, problems = time.monotonic(), dict[Config, float](), list[str]()
    for config in configs:
        if times and time.monotonic() - begin > SECONDS:
            break
        try:
            times[config] = clock(lambda config=config: family.under(config, *args))
        except Exception as error:  # the compiler's or the driver's own, of any kind: the config is passed over  # noqa: BLE001
            problems.append(f"{config}: {type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}")
    if not times:
        raise InternalError(f"no config of {family.name} runs: {'; '.join(problems)}")
    return min(times, key=lambda c: times[c])


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median, with an empty cache before each call."""
    with torch.no_grad():
        return float(triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median"))


# -- what is remembered ------------------------------------------------------------------------------------------------


@functools.cache
def _cache() -> cache.JsonCache:
    return cache.JsonCache("triton")


@functools.cache
def _source(module: str) -> str:
    """Digest of a kernel's file and of the device code that all share."""
    files = (Path(str(sys.modules[module].__file__)), Path(__file__).with_name("language.py"))
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:12]


def _key(family: Family, device: str, bucket: tuple[Any, ...]) -> str:
    return " | ".join([family.name, device, f"triton {triton.__version__}", _source(family.plan.__module__), repr(bucket)])


@functools.cache
def _shipped(device: str) -> dict[str, str]:
    path = TUNED / f"{device.replace(' ', '_')}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _stored(key: str, device: str) -> str | None:
    found = _cache().get(key)
    return found if isinstance(found, str) else _shipped(device).get(key)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune every benchmark shape of the kernels named (all, without names) and write the shipped file for this GPU."""
    parser = argparse.ArgumentParser(prog="graphwright.kernels.gpu.tuning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", nargs="*", help="only these kernels")
    options = parser.parse_args(argv)
    found = machine.here()
    if found is None:
        parser.error("there is no GPU to tune for")
    table = dict(_shipped(found.name))
    for family in gpu.families().values():
        for sample in family.samples() if not options.kernels or family.name in options.kernels else ():
            args = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in sample.args(torch.Generator().manual_seed(0)))
            if sample.bench and family.refuses(*args) is None:
                begin = time.perf_counter()
                best = choose(family, args)
                table[_key(family, found.name, family.bucket(*args))] = str(best)
                print(f"{family.name} {sample.name}: {best} ({time.perf_counter() - begin:.1f} s)", flush=True)
    TUNED.mkdir(exist_ok=True)
    path = TUNED / f"{found.name.replace(' ', '_')}.json"
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"{len(table)} choices in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
