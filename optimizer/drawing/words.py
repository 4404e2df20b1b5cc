"""Figures and sites in few letters."""

from __future__ import annotations


def show_ms(ms: float | None) -> str:
    if ms is None:
        return ""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def show_share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def short(site: str, width: int) -> str:
    """A site in at most ``width`` columns still told from its neighbours: ``e.l.0.attention.output.dense``."""
    parts = site.split(".")
    for k, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= width:
            break
        if not part.isdigit():
            parts[k] = part[:1]
    return clip(".".join(parts), width)


def clip(text: str, width: int) -> str:
    """``text`` with its middle left out where it is too long."""
    tail = (width - 1) // 2
    return text if len(text) <= width else text[: max(width - 1 - tail, 0)] + "…" + text[len(text) - tail :]
