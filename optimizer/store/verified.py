"""Graphs whose values were found right earlier: the check depends on the file, torch and this code alone.

Running every op of a graph without memory imports most of PyTorch's compiler, which takes longer than all the rest of
loading. The outcome is therefore remembered, by the checksum of the graph, in the private cache of this user: a file that
was saved here, or loaded once, is not checked in that way again. Everything else about a file is checked at every load.
"""

from __future__ import annotations

import functools
import hashlib
from contextlib import suppress
from pathlib import Path

import torch

from graphwright import cache

_NAME, _MOST = "verified", 4096


@functools.cache
def _code() -> bytes:
    """Digest of what decides whether a graph is right: this package's ops and rules, and torch's version."""
    here = Path(__file__).parent
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted([*here.glob("*.py"), *(here.parent / "ops").glob("*.py"), here.parent / "nodes.py"]):
        digest.update(file.read_bytes())
    return digest.digest()


def _key(checksum: str) -> str:
    return hashlib.sha256(_code() + checksum.encode()).hexdigest()


def known(checksum: str) -> bool:
    """Whether the graphs of this checksum were found right."""
    try:
        return (cache.private(_NAME) / _key(checksum)).is_file()
    except (OSError, RuntimeError):
        return False


def note(checksum: str) -> None:
    """Remember that they were. Where nothing can be kept, the next load checks again."""
    with suppress(OSError, RuntimeError):
        folder = cache.private(_NAME)
        cache.write_atomic(folder / _key(checksum), b"")
        kept = list(folder.iterdir())
        for old in sorted(kept, key=lambda p: p.stat().st_mtime)[: len(kept) - _MOST]:
            old.unlink(missing_ok=True)
