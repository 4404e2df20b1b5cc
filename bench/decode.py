#!/usr/bin/env python
"""Time how fast language models generate: transformers' own loop, torch.compile, and Graphwright's decoders, in turns.

    python bench/decode.py --model gpt2-124m,llama-110m --peers eager,graphwright,graphwright-int8 --rounds 10 --out bench/results/decode/cpu.json
    python bench/decode.py --list

Random weights: speed does not depend on what they say. Every peer is prepared first and its greedy answer compared with eager's;
an exact peer whose answer differs gets no time. In each round every peer generates once, in a new order. A clock that is told
of each token parts the first token (prefill) from the others (steps). All in one process and with the same threads.

The file: {"schema": "graphwright-decode-bench/1", "date", "commit", "command", "machine", "versions", "settings", "models": [{"model",
"description", "parameters", "peers": [{"peer", "status": ok | failed | wrong, "reason", "prepare_s", "same_tokens", "tensor_mb",
"prefill_ms", "tokens_per_second": {"median", "best"}, "times_eager", "rounds": [[prefill ms, ms per step], ...]}]}]}.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0:1] = []
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from bench import results
from bench.run import _positive

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = "graphwright-decode-bench/1"

Generate = Callable[[Tensor, int, Any], Tensor]


@dataclass(frozen=True)
class Language:
    """One model: transformers' class, its config, and a description."""

    name: str
    description: str
    kind: str
    config: str
    options: dict[str, Any]

    def model(self) -> nn.Module:
        """The module in eval mode, float32, seeded; the global generator is untouched."""
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, self.config)(**self.options, bos_token_id=None, eos_token_id=None, pad_token_id=0)
            model = getattr(transformers, self.kind)(config)
        return model.eval().requires_grad_(False)


LANGUAGES = (
    Language("gpt2-124m", "GPT-2 small (768/12/12, 50,257 tokens)", "GPT2LMHeadModel", "GPT2Config", {}),
    Language("llama-110m", "Llama with grouped queries (768/12/12 heads, 4 for keys, 2,048, 32,000 tokens)", "LlamaForCausalLM", "LlamaConfig",
             {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
              "vocab_size": 32000, "max_position_embeddings": 2048}),
    Language("tiny", "GPT-2 of two layers, for tests", "GPT2LMHeadModel", "GPT2Config",
             {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 64}),
)  # fmt: skip


def eager(model: nn.Module, prompt: Tensor, total: int) -> Generate:
    return lambda ids, new, streamer: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, streamer=streamer)


def inductor(model: nn.Module, prompt: Tensor, total: int) -> Generate:
    import copy

    twin = copy.deepcopy(model)
    twin.forward = torch.compile(twin.forward, dynamic=True)
    return eager(twin, prompt, total)


def graphwright(recipe: str, cache: str) -> Callable[[nn.Module, Tensor, int], Generate]:
    def prepare(model: nn.Module, prompt: Tensor, total: int) -> Generate:
        import graphwright as gw

        # as for the other peers' int8: what was asked for is measured, whether it is faster or not
        goal = None if recipe == "default" else gw.Goal(size_mb=1e6)
        calibration = [torch.randint(0, model.config.vocab_size, prompt.shape) for _ in range(4)] if recipe == "int8" else None
        decoder = gw.optimize_decoder(model, prompt, recipe, cache=cache, max_length=total, goal=goal, calibration=calibration)  # type: ignore[arg-type]

        def generate(ids: Tensor, new: int, streamer: Any) -> Tensor:
            return decoder.generate(ids, new, eos_token_id=None, streamer=streamer)  # type: ignore[return-value]

        generate.decoder = decoder  # type: ignore[attr-defined]
        return generate

    return prepare


#: name → (exact, what prepares it)
PEERS: dict[str, tuple[bool, Callable[[nn.Module, Tensor, int], Generate]]] = {
    "eager": (True, eager),
    "inductor": (True, inductor),
    "graphwright": (True, graphwright("default", "dynamic")),
    "graphwright-static": (True, graphwright("default", "static")),
    "graphwright-int8-dynamic": (False, graphwright("int8-dynamic", "dynamic")),
    "graphwright-int8": (False, graphwright("int8", "dynamic")),
    "graphwright-w8": (False, graphwright("w8", "dynamic")),
}


class Clock:
    """A streamer that notes when each token is known; the first thing it is given is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def figures(self, start: float) -> tuple[float, float]:
        """Milliseconds until the first token, and per token after it."""
        first, last, count = self.times[1], self.times[-1], len(self.times) - 2
        return 1e3 * (first - start), 1e3 * (last - first) / max(1, count)


@dataclass(frozen=True)
class Settings:
    """How to measure: rounds, prompt tokens, new tokens, rows, threads. transformers' streamers take one row alone."""

    rounds: int = 10
    prompt: int = 64
    new: int = 64
    threads: int = 1


def measure(entry: Language, names: Sequence[str], settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """One model with these peers; a peer that fails or answers wrongly costs a line."""
    torch.set_num_threads(settings.threads)
    model, total = entry.model(), settings.prompt + settings.new
    ids = torch.randint(1, model.config.vocab_size, (1, settings.prompt), generator=torch.Generator().manual_seed(1))
    wanted = eager(model, ids, total)(ids, settings.new, None)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Generate] = {}
    for name in names:
        say(f"{entry.name}: preparing {name}")
        exact, prepare = PEERS[name]
        start, row = time.perf_counter(), {"peer": name, "status": "ok", "reason": None, "rounds": []}
        found[name] = row
        try:
            with torch.no_grad():
                generate = prepare(model, ids, total)
                got = generate(ids, settings.new, None)
        except Exception as error:  # noqa: BLE001  whatever a peer does: the others go on
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            continue
        same = float((got == wanted)[:, settings.prompt :].float().mean()) if got.shape == wanted.shape else 0.0
        decoder = getattr(generate, "decoder", None)
        row |= {"prepare_s": round(time.perf_counter() - start, 2), "same_tokens": round(same, 4),
                "tensor_mb": None if decoder is None else round(decoder.size_bytes() / 1e6, 2),
                "verdict": None if decoder is None else decoder.report.verdict}  # fmt: skip
        if exact and same < 1:
            row |= {"status": "wrong", "reason": f"{100 * same:.0f} % of the tokens are eager's"}
            continue
        ready[name] = generate
    order = list(ready)
    for k in range(settings.rounds):
        say(f"{entry.name}: round {k + 1}/{settings.rounds}")
        random.Random(k).shuffle(order)
        for name in order:
            clock, start = Clock(), time.perf_counter()
            with torch.no_grad():
                ready[name](ids, settings.new, clock)
            found[name]["rounds"].append([round(ms, 4) for ms in clock.figures(start)])
    for row in found.values():
        row |= _figures(row["rounds"], found.get("eager", {}).get("rounds", []))
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": entry.name, "description": entry.description, "parameters": parameters, "peers": list(found.values())}


def _figures(rounds: list[list[float]], base: list[list[float]]) -> dict[str, Any]:
    if not rounds:
        return {"prefill_ms": None, "tokens_per_second": None, "times_eager": None}
    steps = [step for _, step in rounds]
    ratios = [a[1] / b[1] for a, b in zip(base, rounds, strict=False)]
    return {
        "prefill_ms": round(statistics.median(first for first, _ in rounds), 3),
        "tokens_per_second": {"median": round(1e3 / statistics.median(steps), 2), "best": round(1e3 / min(steps), 2)},
        "times_eager": round(statistics.median(ratios), 3) if ratios else None,
    }


def run(names: Sequence[str], peers: Sequence[str], settings: Settings, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """All models with all peers; written to ``out`` after each model. KeyError for a name that does not exist."""
    entries = {e.name: e for e in LANGUAGES}
    for word, known in [(n, entries) for n in names] + [(p, PEERS) for p in peers]:
        if word not in known:
            raise KeyError(f"no {word!r}; known: {', '.join(known)}")
    record = {"schema": SCHEMA, "date": results.now(), "commit": results.commit(ROOT), "command": results.command(sys.argv), "machine": results.machine(),
              "versions": results.versions(), "settings": asdict(settings), "models": []}  # fmt: skip
    for name in names:
        record["models"].append(measure(entries[name], peers, settings, say))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return record


def table(record: dict[str, Any]) -> str:
    """A Markdown table per model; what gave no time stands below it."""
    parts = []
    for model in record["models"]:
        lines = [(f"**{model['model']}**: {model['description']}, {model['parameters'] / 1e6:.1f} M parameters, {record['settings']['prompt']} tokens of prompt, "
                 f"{record['settings']['new']} new"), "", "| peer | prefill ms | tokens/s | times eager | same tokens | tensors MB | prepare s |",
                 "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
        for p in model["peers"]:
            if p["status"] == "ok" and p["tokens_per_second"]:
                cells = (p["prefill_ms"], p["tokens_per_second"]["median"], p["times_eager"], p["same_tokens"], p["tensor_mb"], p["prepare_s"])
                lines.append(f"| {p['peer']} | " + " | ".join("-" if c is None else f"{c}" for c in cells) + " |")
        lines += [f"- {p['peer']}: {p['status']}, {p['reason']}" for p in model["peers"] if p["status"] != "ok"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; 2 for names that don't exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Settings()
    add("--model", default="gpt2-124m,llama-110m", help="names, separated by commas (default: %(default)s)")
    add("--peers", default="eager,graphwright,graphwright-static,graphwright-int8-dynamic,graphwright-w8", help="names (default: %(default)s)")
    add("--rounds", type=_positive, default=default.rounds, help="rounds in turns (default: %(default)s)")
    add("--prompt", type=_positive, default=default.prompt, help="tokens of the prompt (default: %(default)s)")
    add("--new", type=_positive, default=default.new, help="tokens to generate, 2 or more (default: %(default)s)")
    add("--threads", type=_positive, default=results.physical_cores(), help="for every peer (default: physical cores)")
    add("--out", type=Path, help="the JSON file to write")
    add("--list", action="store_true", help="list models and peers, then stop")
    options = parser.parse_args(words)
    if options.list:
        print("\n".join(["models", *(f"  {e.name:<12} {e.description}" for e in LANGUAGES), "peers", *(f"  {p}" for p in PEERS)]))
        return 0
    settings = Settings(options.rounds, options.prompt, max(2, options.new), options.threads)
    try:
        record = run(options.model.split(","), options.peers.split(","), settings, options.out, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
