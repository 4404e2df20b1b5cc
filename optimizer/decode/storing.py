"""A decoder on disk: both programs in one file, the weights they share once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from graphwright import store
from graphwright.backends.packs import shared
from graphwright.decode.decoder import Decoder, Traits
from graphwright.decode.report import DecoderReport
from graphwright.errors import LoadError
from graphwright.report.plain import from_plain, to_plain
from graphwright.saving import archive_of, rebuilt

KEY = "decoder"


def save(decoder: Decoder, path: str | Path) -> None:
    """See ``Decoder.save``."""
    halves = [archive_of(half.fast) for half in (decoder._prefill, decoder._step)]
    meta = {
        KEY: {"traits": to_plain(decoder.traits), "prefill": len(halves[0].variants), "report": _small(decoder.report)},
        "report": halves[0].meta["report"], "step report": halves[1].meta["report"],
        "attributes": halves[0].meta["attributes"], "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if needs := {k: v for half in halves for k, v in half.meta.get("needs", {}).items()}:
        meta["needs"] = needs
    store.save(path, store.Archive([v for half in halves for v in half.variants], meta))
    decoder.report.file_bytes = Path(path).stat().st_size


def _small(report: DecoderReport) -> dict[str, Any]:
    """The report without those of the programs, which are stored beside it."""
    return {f.name: to_plain(getattr(report, f.name)) for f in dataclasses.fields(report) if f.name not in ("prefill", "step")}


def restored(archive: store.Archive) -> Decoder:
    """The decoder of a file that ``save`` wrote.

    Raises:
        LoadError: what the file says about itself does not fit together.
    """
    meta = archive.meta
    said = meta[KEY]
    if not isinstance(said, dict) or not isinstance(said.get("prefill"), int) or not 0 < said["prefill"] < len(archive.variants):
        raise LoadError("the file names no prefill and step programs", hint="Save the decoder again.")
    traits = from_plain(Traits, said.get("traits"), "traits")
    if traits.cache not in ("dynamic", "static") or (traits.cache == "static" and not traits.max_length):
        raise LoadError(f"the file has a cache of kind {traits.cache!r}", hint="Save the decoder again.")
    parts = (archive.variants[: said["prefill"]], meta), (archive.variants[said["prefill"] :], {**meta, "report": meta.get("step report")})
    with shared():  # as when they were made; what was captured later packs its own
        prefill, step = (rebuilt(variants[-1:], about) for variants, about in parts)
    for fast, (variants, about) in zip((prefill, step), parts, strict=True):
        fast._variants[:0] = rebuilt(variants[:-1], about)._variants
    report = told(meta)
    report.prefill, report.step = prefill.report, step.report
    return Decoder(prefill, step, traits, report)


def told(meta: dict[str, Any]) -> DecoderReport:
    """The report in what a file says about itself.

    Raises:
        LoadError: it is none.
    """
    said = meta[KEY].get("report") if isinstance(meta[KEY], dict) else None
    if not isinstance(said, dict):
        raise LoadError("the file holds no report of a decoder", hint="Save the decoder again.")
    return DecoderReport.from_dict({**said, "prefill": meta.get("report"), "step": meta.get("step report")})
