"""A ``Comparison`` as a page, and as a part of the report's page: a drawing over the sites, and a table, the worst first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from graphwright.report.comparison import Comparison, Deviation
from graphwright.report.comparison_text import figures
from graphwright.report.words import show_db

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 1120.0, 260.0, 46.0, 24.0
#: dB at the top of the drawing: float32 agrees with itself to about as much
_TOP_DB = 150.0


def page(c: Comparison) -> str:
    """The whole page."""
    from graphwright.report.html import document

    head = f"<h1>{escape(c.model)}</h1><p class=soft>recipe <code>{escape(c.recipe)}</code>, against the original</p>"
    return document(f"{c.model}: Graphwright comparison", head + section(c))


def section(c: Comparison) -> str:
    """The comparison as a part of a page."""
    from graphwright.report.html import table

    outputs = [(f"<code>{escape(o.path)}</code>", escape(o.shape), *map(escape, figures(o.error)), f"{o.differing} of {o.count}") for o in c.outputs]
    worst = max((10 ** (-d.as_it_runs.sqnr_db / 20) for d in c.sites if math.isfinite(d.as_it_runs.sqnr_db)), default=1.0) or 1.0
    rows = [_cells(d, worst) for d in c.sites]
    return "".join([
        f"<h2>Against the original, on {c.inputs} input{'s' * (c.inputs != 1)}</h2>",
        table(("output", "shape", "SQNR dB", "largest", "cosine", "differ"), outputs, 2) if outputs else "",
        drawing(c.sites) if c.sites else "",
        "<p class=soft>As it runs: behind the errors of the ops before it. Alone: its kernel on the original's values. "
        "The longer the bar, the larger the error.</p>" if rows else "",
        f"<div class=scroll>{table(('site', 'kernel', 'SQNR dB', 'alone', 'arises', 'largest', 'cosine'), rows, 2)}</div>" if rows else "",
        f"<p class=soft>Part of others now: {escape(', '.join(c.missing))}.</p>" if c.missing else "",
        "".join(f"<p class=soft>{escape(n)}</p>" for n in c.notes),
    ])  # fmt: skip


def _cells(d: Deviation, worst: float) -> tuple[str, ...]:
    db, largest, cosine = figures(d.as_it_runs)
    size = 10 ** (-d.as_it_runs.sqnr_db / 20) / worst if d.as_it_runs.sqnr_db != -math.inf else 1.0
    kind = _kind(d)
    meter = f'<span class=meter><i class="{"bad" if d.arises == "here" else kind}" style="width:{100 * min(size, 1.0):.1f}%"></i></span>'
    names = "<br>".join(f"<code{' class=soft' if k else ''}>{escape(s)}</code>" for k, s in enumerate(d.sites[:4]))
    about = " ".join(escape(x) for x in (d.op, d.shape, d.note) if x)
    alone = "" if d.alone is None else show_db(d.alone.sqnr_db)
    return (f"{names}<br><span class=soft>{about}</span>", f'<span class="tag {kind}">{escape(d.precision)}</span> <code>{escape(d.kernel)}</code>',
            db + meter, alone, d.arises, largest, cosine)  # fmt: skip


def _kind(d: Deviation) -> str:
    return d.precision if d.precision in ("int8", "bf16", "fp16") else "f32"


def drawing(sites: Sequence[Deviation]) -> str:
    """SQNR over the sites in graph order: a line as they run, a dot for each kernel alone."""
    rows = sorted(sites, key=lambda d: d.position)
    step = (_WIDTH - _LEFT - 10) / max(1, len(rows) - 1)
    x = lambda k: _LEFT + k * step
    y = lambda db: (_HEIGHT - _BOTTOM) - (_HEIGHT - _BOTTOM - 8) * min(max(db, 0.0), _TOP_DB) / _TOP_DB
    start = (f'<div class="scroll center"><svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" aria-label="error by site" style="max-width:100%;height:auto" '
           f'width="{_WIDTH:.0f}" height="{_HEIGHT:.0f}" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}">')  # fmt: skip
    out = [start]
    for db in range(0, int(_TOP_DB) + 1, 25):
        out.append(f'<path class="edge" d="M{_LEFT:.0f} {y(db):.1f}H{_WIDTH - 10:.0f}" stroke-dasharray="2 5"/>'
                   f'<text class="small" x="{_LEFT - 20:.0f}" y="{y(db) + 4:.1f}">{db} dB</text>')  # fmt: skip
    line = " ".join(f"{x(k):.1f},{y(d.as_it_runs.sqnr_db):.1f}" for k, d in enumerate(rows))
    out.append(f'<polyline points="{line}" fill="none" stroke="var(--f32)" stroke-width="1.6"/>')
    for k, d in enumerate(rows):
        colour = {"int8": "var(--int8)", "bf16": "var(--bf16)", "fp16": "var(--bf16)"}.get(d.precision, "var(--f32)")
        hover = f"{d.site}: {show_db(d.as_it_runs.sqnr_db)} dB as it runs" + (f", {show_db(d.alone.sqnr_db)} dB alone" if d.alone else "") + f"; {d.kernel}"
        dot = f'<circle cx="{x(k):.1f}" cy="{y(d.as_it_runs.sqnr_db):.1f}" r="2.2" fill="var(--f32)"/>'
        if d.alone is not None:
            ring = "var(--simulated)" if d.arises == "here" else colour
            dot += f'<circle cx="{x(k):.1f}" cy="{y(d.alone.sqnr_db):.1f}" r="4" fill="{colour}" stroke="{ring}" stroke-width="1.5"/>'
        out.append(f"<g><title>{escape(hover)}</title>{dot}</g>")
    out.append(f'<text class="small" x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 5:.0f}">sites in graph order; line: as it runs; '
               "dots: alone (ringed red where most of the error arises); higher is closer to the original</text></svg></div>")  # fmt: skip
    return "".join(out)
