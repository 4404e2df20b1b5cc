"""The runner of the kernel benchmark."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright import kernels, measure, ops
from graphwright.errors import GraphwrightError
from graphwright.kernel import Kernel, Sample
from graphwright.kernel_registry import registered
from graphwright.microbench import clock
from graphwright.microbench.cases import samples_for
from graphwright.microbench.peers import COMPILED, FLOOR_DB, NAMES, Absent, peers_of
from graphwright.microbench.results import HEADER, Peer, Result, line, notes, plain, plot, write_csv
from graphwright.microbench.shapes import SETS, shapes_of
from graphwright.numerics import sqnr_db
from graphwright.testing.kernels import arguments, disagreement, reference_of


@dataclass(frozen=True)
class Plan:
    """How to time: rounds at most, whether caches are emptied before each call, and beside which peers (None: all)."""

    rounds: int = 30
    cold: bool = True
    peers: frozenset[str] | None = None


def unit_of(kernel: Kernel, args: tuple[Any, ...] = ()) -> str:
    """What does a kernel's arithmetic on these arguments."""
    if "sparse" in kernel.op and isinstance(args[0], Tensor) and args[0].dtype == torch.int8:
        return "int8"
    whole = ("linear_int8", "conv2d_int8", "w4a8", "attention_int8")
    if any(word in kernel.op for word in whole):
        return "int8"
    if "fp8" in kernel.op and kernel.device != "cpu":
        return "fp8"
    return "f32" if kernel.device == "cpu" else "fp16"


def bench(kernel: Kernel, sample: Sample, plan: Plan | None = None) -> Result:
    """Check one kernel on one sample and, where it is right, time it beside the peers that are right too."""
    plan = plan or Plan()
    args = arguments(kernel, sample)
    begin = time.process_time()
    problem = _problem(kernel, sample, args)
    spent = time.process_time() - begin
    cost, unit = kernel.cost(*args), unit_of(kernel, args)
    if problem is not None:
        return Result(kernel.op, kernel.backend, sample.name, problem, cost.bytes, cost.flops, unit)
    with torch.no_grad():
        ours = kernel.prepared(*args)
        rivals, absent = _rivals(kernel, args, plan)
        calls = [ours, *rivals.values()]
        if kernel.device == "cuda":  # what the device does, without the host's part of each call
            calls = [clock.recorded(call) for call in calls]
        mine, *theirs = clock.timed(calls, kernel.device, rounds=plan.rounds, cold=plan.cold)
        replay = clock.replayed(ours) if kernel.device == "cuda" else None
    peers = [Peer(name, t, t.p50 / mine.p50) for name, t in zip(rivals, theirs, strict=True)]
    speed, rate = cost.bytes / mine.p50 / 1e6, cost.flops / mine.p50 / 1e6
    return Result(kernel.op, kernel.backend, sample.name, "ok", cost.bytes, cost.flops, unit, mine, replay, (*peers, *absent), speed, rate,
                  speed / clock.copy_bandwidth(kernel.device), rate / clock.peak(unit, kernel.device), spent)  # fmt: skip


def _problem(kernel: Kernel, sample: Sample, args: tuple[Any, ...]) -> str | None:
    """None, or what is wrong with the kernel on the sample: also that it, or the reference, does not come to a result."""
    try:
        return disagreement(kernel, sample, args=args)
    except Exception as error:  # noqa: BLE001  the compiler's or the device's own, of any kind
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0][:300] if text else 'no message'}"


def _rivals(kernel: Kernel, args: tuple[Any, ...], plan: Plan) -> tuple[dict[str, Any], list[Peer]]:
    """Calls of the peers that compute the same, and those that don't with the reason."""
    row = next((r for r in ops.rows() if r.name == kernel.op), None)
    if row is None:
        return {}, []
    named, found, absent = dict(zip(row.params, args, strict=False)), {}, []
    wanted = reference_of(kernel)(*args)
    for name, make in peers_of(kernel.op).items():
        if plan.peers is not None and name not in plan.peers:
            continue
        try:
            call = make(named, kernel.device)
            reached = _agreement(call(), wanted, named)
            if reached < FLOOR_DB:
                raise Absent(f"its result has {reached:.0f} dB against the reference, {FLOOR_DB:.0f} are asked")
            found[name] = call
        except Absent as why:
            absent.append(Peer(name, reason=str(why)))
        except Exception as error:  # whatever a peer raises is its reason  # noqa: BLE001
            text = str(error).strip().splitlines()
            absent.append(Peer(name, reason=f"{type(error).__name__}: {text[0][:160] if text else 'no message'}"))
    return found, absent


def _agreement(got: Any, wanted: Any, named: dict[str, Any]) -> float:
    """The worst SQNR of a peer's results; quantized ones are compared as what they stand for."""
    pairs = list(zip(_several(got), _several(wanted), strict=False))
    scale, point = named.get("scale", 1.0), named.get("zero_point", 0)

    def real(x: Tensor) -> Tensor:
        quantized = not x.is_floating_point() and named.get("dtype") is not None
        return (x.double() - point) * scale if quantized else x.double()

    return min((sqnr_db(real(w).nan_to_num(), real(g).nan_to_num().reshape(w.shape)) for g, w in pairs), default=0.0)


def _several(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor)]


def known() -> dict[str, list[Kernel]]:
    """Every kernel by its op: Graphwright's own, those that were registered, and those of installed plug-ins."""
    from graphwright.passes.pipeline import load_plugins

    load_plugins()
    found = {op: list(several) for op, several in kernels.load().items()}
    for kernel in registered():
        found.setdefault(kernel.op, []).append(kernel)
    return found


def chosen(words: Sequence[str], device: str, shapes: Sequence[str] = (), everything: bool = False) -> Iterator[tuple[Kernel, Sample]]:
    """Kernels of a device whose op has one of the words in its name (all, without words), on their own samples or on layers of shapes."""
    sets = [shapes_of(name) for name in shapes]
    for op, found in sorted(known().items()):
        for kernel in found:
            if kernel.device != device or words and not any(word in op for word in words):
                continue
            if sets:
                given = dict.fromkeys(s for several in sets for s, _ in samples_for(op, several, device))
                seen: set[str] = set()
                yield from ((kernel, s) for s in given if not (s.name in seen or seen.add(s.name)))  # type: ignore[func-returns-value]
            else:
                yield from ((kernel, s) for s in kernel.samples() if s.bench or everything)


def main(argv: Sequence[str] | None = None, prog: str = "graphwright bench kernels") -> int:
    """Print the table; 1 where a kernel was wrong, or refused one of its own samples."""
    options = _parser(prog).parse_args(argv)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        pairs = list(chosen([*options.words, *options.op], device, options.shapes, options.all))
    except GraphwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not pairs:
        return _nothing([*options.words, *options.op], device)
    plan = Plan(options.rounds, not options.warm, _peers(options, device))
    print(f"{device}, {torch.get_num_threads()} threads, copy {clock.copy_bandwidth(device):.1f} GB/s (read + written)")
    print(HEADER)
    results: list[Result] = []
    with suppress(KeyboardInterrupt):  # what was measured so far is still written
        for kernel, sample in pairs:
            results.append(bench(kernel, sample, plan))
            print(line(results[-1]), flush=True)
    print("\n".join(notes(results)))
    _write(results, device, options)
    # a layer of a model may be none for a kernel; its own samples never are
    return int(any(r.verdict != "ok" and not (options.shapes and r.verdict.startswith("refused")) for r in results))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Check every kernel on its samples, then time it beside its peers.")
    parser.add_argument("words", nargs="*", help="only ops whose name contains one of these")
    parser.add_argument("--op", action="append", default=[], help="the same, as an option")
    parser.add_argument("--shapes", action="append", default=[], help=f"layers of {', '.join(SETS)}, or a JSON file; by default each kernel's own samples")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the GPU where there is one")
    parser.add_argument("--peer", action="append", default=[], choices=NAMES, help="only beside these")
    parser.add_argument("--compiled", action="store_true", help="also beside those that Inductor compiles, which takes 10 to 40 s a sample on a CPU")
    parser.add_argument("--no-peers", action="store_true", help="time ours alone")
    parser.add_argument("--rounds", type=int, default=30, help="rounds at most")
    parser.add_argument("--warm", action="store_true", help="leave the caches as the call before left them")
    parser.add_argument("--all", action="store_true", help="the odd samples of the correctness test too")
    for kind, what in (("json", "everything"), ("csv", "a table"), ("plot", "the roofline (.svg, .png; needs matplotlib)")):
        parser.add_argument(f"--{kind}", type=Path, help=f"write {what} to this file")
    return parser


def _peers(options: argparse.Namespace, device: str) -> frozenset[str]:
    if options.no_peers:
        return frozenset()
    return frozenset(options.peer) or frozenset(NAMES) - (frozenset() if options.compiled or device == "cuda" else COMPILED)


def _nothing(words: Sequence[str], device: str) -> int:
    if device == "cuda" and not torch.cuda.is_available():
        print("error: there is no CUDA device here", file=sys.stderr)
    else:
        print(f"error: no kernel for {' '.join(words)!r} on {device}; there are {', '.join(sorted(known()))}", file=sys.stderr)
    return 2


@functools.cache
def _commit() -> dict[str, Any]:
    """The commit of a checkout that this file lies in; nothing where it is installed."""
    import subprocess

    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _write(results: Sequence[Result], device: str, options: argparse.Namespace) -> None:
    peaks = {unit: clock.peak(unit, device) for unit in sorted({r.unit for r in results if r.times})}
    if options.json:
        record = {
            "schema": "graphwright-kernels/2", "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": _commit(),
            "machine": measure.machine() | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}), "device": device,
            "threads": torch.get_num_threads(), "cold": not options.warm, "copy_gb_per_s": clock.copy_bandwidth(device), "peak_gop_per_s": peaks,
            "results": [plain(r) for r in results],
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.csv:
        write_csv(results, options.csv)
    if options.plot:
        plot(results, clock.copy_bandwidth(device), peaks, options.plot)
