"""The report as one HTML page: inline CSS and SVG, light and dark, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from graphwright.drawing.svg import DETAILED, STYLE, VARIABLES, css_class, every_op, overview
from graphwright.report.comparison import Comparison
from graphwright.report.comparison_html import section as comparison_section
from graphwright.report.model import Report, SiteRow
from graphwright.report.words import (
    figures,
    gain,
    pass_cells,
    quantized_words,
    show_bytes,
    show_db,
    show_ms,
    show_share,
)

_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 22px 60px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}h1{font-size:24px;margin:0 0 2px}
h2{font-size:17px;margin:34px 0 10px}p{margin:4px 0}.soft{color:var(--soft)}
.verdict{font-size:18px;margin:8px 0;color:var(--weak)}.verdict.good{color:var(--good)}
.warning{border-left:4px solid var(--asis);background:var(--panel);padding:6px 12px;margin:8px 0}
table{border-collapse:collapse;width:100%;font-size:13.5px}th{font-weight:600;color:var(--soft);text-align:left}
th,td{padding:4px 12px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
code{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.scroll{overflow:auto;max-height:78vh;border:1px solid var(--line);border-radius:8px;background:var(--panel);
padding:10px}td code{white-space:nowrap}td:first-child code{white-space:normal}td .soft{font-size:12px}
td summary{margin:0}.scroll th{position:sticky;top:-10px;background:var(--panel)}.scroll.center{text-align:center}
.scroll table{background:var(--panel)}.figures{width:auto;min-width:520px}.figures td{padding-right:28px}
.figures td:last-child{text-align:left;white-space:normal}
.tag{display:inline-block;padding:0 7px;border-radius:9px;font-size:12px;color:#fff;white-space:nowrap}
.tag.int8{background:var(--int8)}.tag.bf16,.tag.fp16{background:var(--bf16)}.tag.f32{background:var(--f32)}
.tag.asis{background:var(--asis)}.tag.simulated{background:var(--simulated)}
.meter{display:inline-block;width:90px;height:8px;background:var(--line);border-radius:3px;overflow:hidden;
margin-left:8px}.meter i{display:block;height:8px;background:var(--f32)}.meter i.int8{background:var(--int8)}
.meter i.bf16,.meter i.fp16{background:var(--bf16)}.meter i.asis{background:var(--asis)}
.meter i.simulated,.meter i.bad{background:var(--simulated)}
.shares{display:flex;height:22px;border-radius:5px;overflow:hidden;margin:6px 0;max-width:700px;font-size:12px;
color:#fff}.shares span{padding:2px 8px;overflow:hidden;white-space:nowrap;background:var(--f32)}
.shares span:nth-child(1){background:#3b6ea8}.shares span:nth-child(2){background:#2c8f7b}
.shares span:nth-child(3){background:#8b6fb3}.shares span:nth-child(4){background:#b0783a}
summary{cursor:pointer;color:var(--soft);margin:8px 0}
ul{margin:4px 0;padding-left:20px}@media print{.scroll{max-height:none}}
"""


def page(report: Report, comparison: Comparison | None = None) -> str:
    """The whole page; with a comparison of its values, where one was made."""
    good = "good" if (report.speedup or 0) > 1 else ""
    body = [
        f"<h1>{_e(report.model)}</h1><p class=soft>recipe <code>{_e(report.recipe)}</code>, {_e(report.created)}</p>",
        f'<p class="verdict {good}">{_e(report.verdict)}</p>',
        *(f"<p class=warning>{_e(w)}</p>" for w in report.warnings),
        _figures(report),
        _machine(report),
        _shares(report),
        _pictures(report),
        _sites(report),
        comparison_section(comparison) if comparison is not None else "",
        _passes(report),
        _refusals(report),
        _lines("Not captured: runs as you wrote it", [f"{r.where}: {r.what}" for r in report.regions]),
        _lines("Search", report.log),
        _lines("Notes", report.notes),
    ]
    return document(f"{report.model}: Graphwright report", "".join(body))


def document(title: str, body: str) -> str:
    """A page of these contents in our style."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_e(title)}</title><style>{VARIABLES}{STYLE}{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _e(value: object) -> str:
    return escape(str(value), quote=True)


def _row(cells: Iterable[str], numbers: int, tag: str = "td") -> str:
    """A table row; ``cells`` are HTML already, those from ``numbers`` on are figures."""
    return (
        "<tr>"
        + "".join(f"<{tag}{' class=n' if k >= numbers else ''}>{c}</{tag}>" for k, c in enumerate(cells))
        + "</tr>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int, style: str = "") -> str:
    body = "".join(_row(r, numbers) for r in rows)
    return f'<table class="{style}"><thead>{_row(head, numbers, "th")}</thead><tbody>{body}</tbody></table>'


def _figures(report: Report) -> str:
    rows = [tuple(map(_e, r)) for r in figures(report)]
    return table(("", "original", "optimized", ""), rows, 1, "figures") if rows else ""


def _machine(report: Report) -> str:
    facts = [
        f"{k} {', '.join(map(str, v)) if isinstance(v, (list, tuple)) else v}"
        for k, v in (report.machine | report.versions).items()
        if v not in (None, "", [])
    ]
    facts += [f"threads {report.threads}"] if report.threads else []
    facts += [f"{k} {s:.1f} s" for k, s in report.seconds.items()]
    return f"<p class=soft>{_e('; '.join(facts))}</p>" if facts else ""


def _shares(report: Report) -> str:
    shares = report.backend_shares()
    words = ", ".join(f"{d} {n}" for d, n in report.decisions().items())
    quantized = quantized_words(report)
    bars = "".join(
        f'<span style="width:{100 * s:.2f}%" title="{_e(b)} {show_share(s)}">{_e(b)} {show_share(s)}</span>'
        for b, s in shares.items()
    )
    each = ", ".join(f"{b} {show_share(s)}" for b, s in shares.items())
    parts = [
        f"<h2>Where the time goes</h2><div class=shares>{bars}</div><p>{_e(each)}.</p>" if bars else "",
        f"<p>Ops by decision: {_e(words)}.</p>" if words else "",
        f"<p>Quantization: {_e(quantized)}.</p>" if quantized else "",
    ]
    return "".join(parts)


def _pictures(report: Report) -> str:
    if report.graph is None or not report.graph.dots:
        return ""
    whole = every_op(report.graph, report.sites)
    more = (
        f"<details><summary>Every kernel and its ops ({len(report.graph.dots)})</summary>"
        f"<div class='scroll center'>{whole}</div></details>"
        if whole
        else f"<p class=soft>{len(report.graph.dots)} ops are too many for a picture of each (at most {DETAILED}).</p>"
    )
    return (
        "<h2>The program</h2><p class=soft>A box per module, filled by its time. Hover for sites and kernels.</p>"
        f"<div class='scroll center'>{overview(report.graph, report.sites)}</div>{more}"
    )


def _meter(fraction: float, kind: str) -> str:
    return f'<span class=meter><i class="{kind}" style="width:{100 * min(max(fraction, 0.0), 1.0):.1f}%"></i></span>'


def _sites(report: Report) -> str:
    if not report.sites:
        return ""
    slowest = max((r.ms or 0.0 for r in report.sites), default=0.0)
    rows = [_site_cells(r, slowest) for r in sorted(report.sites, key=lambda r: -(r.ms or 0.0))]
    head = ("site", "decision", "kernel", "ms", "share", "gain", "SQNR dB")
    return (
        "<h2>Sites</h2><p class=soft>Gain: against the next best candidate. "
        "SQNR: the longer the bar, the closer to float.</p>"
        f"<div class=scroll>{table(head, rows, 3)}</div>"
    )


def _site_cells(r: SiteRow, slowest: float) -> tuple[str, ...]:
    kind = css_class(r.decision)
    others = "; ".join(
        f"{o.name} {o.problem or (show_ms(o.ms) + ' ms' if o.ms is not None else 'not timed')}" for o in r.options
    )
    names = "<br>".join(f"<code{' class=soft' if k else ''}>{_e(s)}</code>" for k, s in enumerate(r.sites[:4])) + (
        f"<br><span class=soft>and {len(r.sites) - 4} more</span>" if len(r.sites) > 4 else ""
    )
    more = " ".join(p for p in (_e(r.op), _e(r.shape), _e(r.trace or "")) if p)
    error = (
        ""
        if r.sqnr_db is None
        else show_db(r.sqnr_db)
        + _meter((r.sqnr_db if r.sqnr_db == r.sqnr_db else 0.0) / 60, "bad" if not r.sqnr_db >= 20 else kind)
    )
    reason = f"<br><span class=soft>{_e(r.reason)}</span>" if r.reason else ""
    time = "" if r.ms is None else show_ms(r.ms) + _meter(r.ms / slowest if slowest else 0.0, kind)
    facts = ", ".join(
        f for f in (f"{r.flops / 1e6:.1f} MFLOP" if r.flops else "", show_bytes(r.bytes) if r.bytes else "") if f
    )
    return (
        f"{names}<br><span class=soft>{more}</span>{reason}",
        f'<span class="tag {kind}">{_e(r.decision)}</span>',
        f'<code title="{_e(others)}">{_e(r.kernel)}</code>' + (f"<br><span class=soft>{facts}</span>" if facts else ""),
        time,
        show_share(r.share),
        gain(r),
        error,
    )


def _passes(report: Report) -> str:
    if not report.passes:
        return ""
    rows = []
    for p in report.passes:
        name, *rest = map(_e, pass_cells(p))
        lines = [f"{s}: {w}" for s, w in p.result.changes] + p.result.notes + ([p.undone] if p.undone else [])
        shown = "".join(f"<li><code>{_e(line)}</code></li>" for line in lines[:200])
        more = f"<li class=soft>and {len(lines) - 200} more</li>" if len(lines) > 200 else ""
        rows.append([f"<details><summary>{name}</summary><ul>{shown}{more}</ul></details>" if lines else name, *rest])
    return f"<h2>Passes</h2>{table(('pass', 'changed', 'declined', 'nodes', 'tensors', 'SQNR dB', 's'), rows, 1)}"


def _refusals(report: Report) -> str:
    groups = report.grouped_refusals()
    if not groups:
        return ""
    items = "".join(
        f"<li><details><summary>{len(sites)} × {_e(who)}: {_e(reason)}</summary>"
        f"<code>{_e(', '.join(sites))}</code></details></li>"
        for who, reason, sites in groups
    )
    return f"<h2>Declined</h2><ul style='list-style:none;padding:0'>{items}</ul>"


def _lines(title: str, lines: Sequence[str]) -> str:
    return f"<h2>{_e(title)}</h2><ul>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul>" if lines else ""
