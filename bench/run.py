#!/usr/bin/env python
"""Time models against every peer, interleaved.

    python bench/run.py --model resnet50 --peers eager,inductor,graphwright-int8 --rounds 30 --out bench/results/x.json
    python bench/run.py --list

All peers are prepared first, one after the other. Each one's outputs are compared with the model run in float64, on
inputs that it was not prepared with too; a peer whose outputs are out of tolerance gets no time. Then come rounds: in
each, every peer is called a few times, in a new order, so that whatever disturbs the machine disturbs all of them.
After the last round the outputs are compared once more. A peer that is missing or fails costs one line.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a file: the repository's root goes last, so that its folders hide no installed package.
    sys.path[0:1] = []
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench import models, peers, results, table, worker

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_MODELS = ("resnet50", "minilm", "bert-base", "vit-s16")


@dataclass(frozen=True)
class Settings:
    """How to measure. `processes` gives each peer a process of its own; `pause_s` lets the last one's threads rest."""

    rounds: int = 30
    calls: int = 3
    warmup: int = 1
    threads: int = 1
    calibration_batches: int = 8
    processes: bool = True
    warm_caches: bool = False
    pause_s: float = 0.02
    timeout_s: float = 900.0


Say = Callable[[str], None]
MakeSeat = Callable[[models.Entry, peers.Peer, Settings], worker.Seat]


def make_seat(entry: models.Entry, peer: peers.Peer, settings: Settings) -> worker.Seat:
    """The seat that `settings` ask for."""
    if not settings.processes:
        return worker.LocalSeat(entry, peer, settings.threads, settings.calibration_batches)
    return worker.ProcessSeat(
        entry,
        peer,
        settings.threads,
        settings.calibration_batches,
        timeout_s=settings.timeout_s,
        warm_caches=settings.warm_caches,
    )


def measure(
    entry: models.Entry, chosen: Sequence[peers.Peer], settings: Settings, say: Say, seat_for: MakeSeat = make_seat
) -> dict[str, Any]:
    """One model with all `chosen` peers: the record described in `results`. Never raises for what a peer does."""
    torch.set_num_threads(settings.threads)
    model = entry.model()
    parameters = sum(p.numel() for p in model.parameters())
    shapes = _shapes(entry.example())
    dtype, reference = _reference(model, entry)
    del model
    rows, seats, opened = {}, {}, []
    try:
        for peer in chosen:
            opened.append(seat_for(entry, peer, settings))
            rows[peer.name] = _prepared(opened[-1], entry, peer, reference)
            if rows[peer.name]["status"] == "ok":
                seats[peer.name] = opened[-1]
            else:
                opened[-1].close()
            say(_told(rows[peer.name]))
        rounds = _rounds(seats, rows, settings, say)
        _still_right(seats, rows, reference, say)
    finally:
        for seat in opened:  # also when the user stops the run; closing twice is no error
            seat.close()
    _summed_up(rows, rounds)
    return {
        "model": entry.name,
        "description": entry.description,
        "inputs": shapes,
        "parameters": parameters,
        "reference": dtype,
        "peers": list(rows.values()),
    }


def _prepared(seat: worker.Seat, entry: models.Entry, peer: peers.Peer, reference: worker.Outputs) -> dict[str, Any]:
    """Prepare and check one peer: its row of the record, with no times yet. It may be timed where the status is ok."""
    row: dict[str, Any] = {
        "peer": peer.name,
        "precision": peer.precision,
        "sqnr_db": None,
        "floor_db": float(entry.tolerance.floor(peer.precision)),
        "latency": None,
        "speedup": None,
        "rounds_ms": [],
    }
    row |= asdict(seat.prepare())
    if row["status"] == "ok":
        try:
            worst, wrong = results.check(reference, seat.outputs(), row["floor_db"])
            row["sqnr_db"] = round(worst, 2)
            row |= {"status": "wrong", "reason": wrong} if wrong else {}
        except Exception as error:  # noqa: BLE001 - a peer may raise anything
            row |= {"status": "failed", "reason": peers.first_line(error)}
    return row


def _rounds(
    seats: dict[str, worker.Seat], rows: dict[str, dict[str, Any]], settings: Settings, say: Say
) -> dict[str, list[list[float]]]:
    """The interleaved rounds: per peer, per round, the calls' milliseconds. A peer that fails leaves the run."""
    order, shuffle = list(seats), random.Random(0).shuffle
    spent: dict[str, list[list[float]]] = {name: [] for name in order}
    begun = time.perf_counter()
    for index in range(settings.rounds):
        shuffle(order)
        for name in list(order):
            time.sleep(settings.pause_s)
            try:
                spent[name].append(seats[name].time(settings.warmup, settings.calls))
            except Exception as error:  # noqa: BLE001 - a peer may raise anything
                rows[name] |= {"status": "failed", "reason": f"in round {index + 1}: {peers.first_line(error)}"}
                say(_told(rows[name]))
                order.remove(name)
                seats.pop(name).close()
        if index == 0 and settings.rounds > 1:
            say(f"  {settings.rounds} rounds, about {settings.rounds * (time.perf_counter() - begun):.0f} s")
    return spent


def _still_right(
    seats: dict[str, worker.Seat], rows: dict[str, dict[str, Any]], reference: worker.Outputs, say: Say
) -> None:
    for name, seat in seats.items():
        try:
            _, wrong = results.check(reference, seat.outputs(), rows[name]["floor_db"])
        except Exception as error:  # noqa: BLE001 - a peer may raise anything
            wrong = peers.first_line(error)
        if wrong:
            rows[name] |= {"status": "wrong", "reason": f"after the rounds: {wrong}"}
            say(_told(rows[name]))


def _summed_up(rows: dict[str, dict[str, Any]], rounds: dict[str, list[list[float]]]) -> None:
    right = {name for name, row in rows.items() if row["status"] == "ok" and rounds.get(name)}
    for name in right:
        rows[name]["latency"] = results.latency(rounds[name])
        rows[name]["rounds_ms"] = [round(float(np.median(turn)), 4) for turn in rounds[name]]
        if "eager" in right:
            rows[name]["speedup"] = results.speedup(rounds["eager"], rounds[name])


def _reference(model: torch.nn.Module, entry: models.Entry) -> tuple[str, worker.Outputs]:
    """The outputs that count as right: in float64, or in float32 where the model refuses that."""

    def run(dtype: torch.dtype) -> worker.Outputs:
        with torch.no_grad():
            model.to(dtype)
            return [[a.copy() for a in peers.arrays(models.call(model, models.cast(x, dtype)))] for x in entry.checks()]

    try:
        return "float64", run(torch.float64)
    except RuntimeError:
        return "float32", run(torch.float32)


def _shapes(inputs: models.Inputs) -> dict[str, str]:
    named = inputs.items() if isinstance(inputs, dict) else ((str(i), t) for i, t in enumerate(inputs))
    return {name: f"{'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}" for name, t in named}


def _told(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"  {row['peer']}: {row['status']}: {row['reason']}"
    return f"  {row['peer']}: ready in {row['prepare_s']:.1f} s, SQNR {row['sqnr_db']:.1f} dB"


def run(
    names: Sequence[str], peer_names: Sequence[str], settings: Settings, out: Path | None, say: Say
) -> dict[str, Any]:
    """All of `names` with all of `peer_names`; written to `out` after every model, so that nothing measured is lost."""
    chosen = [peers.get(name) for name in peer_names]
    entries = [models.get(name) for name in names]
    record = {
        "schema": results.SCHEMA,
        "date": results.now(),
        "commit": results.commit(ROOT),
        "command": results.command(sys.argv),
        "machine": results.machine(),
        "versions": results.versions(),
        "settings": asdict(settings),
        "models": [],
    }
    for entry in entries:
        say(f"{entry.name}: {entry.description}")
        record["models"].append(measure(entry, chosen, settings, say))
        if out is not None:
            results.save(record, out)
    return record


def listing() -> str:
    """The models and the peers, and why a peer can't run here."""
    width = max(len(name) for name in [*(e.name for e in models.ZOO), *(p.name for p in peers.PEERS)])
    lines = ["models", *(f"  {e.name:<{width}}  {e.description}" for e in models.ZOO), "peers"]
    for peer in peers.PEERS:
        reason = peer.available()
        lines.append(f"  {peer.name:<{width}}  {peer.precision:<8} {'not here: ' + reason if reason else 'available'}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    add = parser.add_argument
    add("--model", default=",".join(DEFAULT_MODELS), help="names, separated by commas (default: %(default)s)")
    add("--peers", default="all", help="names, separated by commas (default: all)")
    add("--rounds", type=_positive, default=default.rounds, help="interleaved rounds (default: %(default)s)")
    add("--calls", type=_positive, default=default.calls, help="timed calls per peer and round (default: %(default)s)")
    add("--warmup", type=int, default=default.warmup, help="untimed calls before them (default: %(default)s)")
    add("--threads", type=_positive, default=results.physical_cores(), help="for every peer (default: physical cores)")
    add("--calibration", type=_positive, default=default.calibration_batches, help="batches (default: %(default)s)")
    add(
        "--timeout",
        type=float,
        default=default.timeout_s,
        help="seconds for one peer to prepare (default: %(default)s)",
    )
    add("--one-process", action="store_true", help="all peers in this process instead of one each")
    add("--warm-caches", action="store_true", help="leave compilers their caches from earlier runs")
    add("--out", type=Path, help="the JSON file to write")
    add("--list", action="store_true", help="list models and peers, then stop")
    return parser


def _positive(word: str) -> int:
    if (value := int(word)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 2 for names that don't exist."""
    options = _parser().parse_args(words)
    if options.list:
        print(listing())
        return 0
    chosen = [p.name for p in peers.PEERS] if options.peers == "all" else options.peers.split(",")
    settings = Settings(
        options.rounds,
        options.calls,
        options.warmup,
        options.threads,
        options.calibration,
        not options.one_process,
        options.warm_caches,
        timeout_s=options.timeout,
    )
    try:
        record = run(
            options.model.split(","),
            chosen,
            settings,
            options.out,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    print(table.table(record))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the doors that close the seats
    sys.exit(main())
