"""The list of recipes and passes, for the command line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from graphwright import ops
from graphwright.errors import RecipeError, nearest
from graphwright.kernel_registry import owner_of, registered
from graphwright.manager import Pass
from graphwright.passes.pipeline import (
    RECIPES,
    STAGES,
    broken_plugins,
    default_recipe,
    distributions,
    known_passes,
    plugin_packages,
    recipes,
    stage_of,
)  # fmt: skip

#: Options that every pass has.
COMMON = {f.name for f in fields(Pass)}


def listing(name: str | None = None) -> Iterator[Any]:
    """What rich prints: all recipes and passes, or one of them in full.

    Raises:
        RecipeError: no recipe or pass has that name.
    """
    from rich.text import Text

    if name is None:
        yield _recipes()
        yield _passes()
        yield _stages()
        if plugins := _plugins():
            yield plugins
        yield Text(
            "Every pass also takes include= and exclude=, patterns of sites. A recipe can be any sequence of these."
        )
        return
    every = known_passes()
    if name not in every and name not in RECIPES:
        known = [*RECIPES, *every]
        raise RecipeError(
            f"there is no recipe or pass {name!r}", hint=nearest(name, known) or f"known: {', '.join(known)}"
        )
    if name in RECIPES:
        yield Text(f"{name}: {RECIPES[name][1]}", style="bold")
        yield Text("\n".join(f"  {p.name:<24} {p.summary()}" for p in recipes()[name]))
    if name in every:
        yield from _one(every[name])


def _recipes() -> Any:
    table = _table("Recipe", "What it gives", "Passes beyond the default ones")
    for name, (extra, line) in RECIPES.items():
        table.add_row(name, line, ", ".join(_spelled(p) for p in extra))
    return table


def _passes() -> Any:
    table = _table("Pass", "Stage", "Numbers", "What it does", "Options")
    standard = [p.name for p in default_recipe()]
    every = known_passes()
    for name in sorted(every, key=lambda n: standard.index(n) if n in standard else len(standard)):
        options = ", ".join(f"{f.name}={_default(f)}" for f in _options(every[name]))
        table.add_row(name, stage_of(name) or "", str(every[name].numerics), every[name].summary(), options)
    return table


def _stages() -> Any:
    table = _table("Stage", "Begins with", "What for")
    for name, (first, line) in STAGES.items():
        table.add_row(name, first, line)
    return table


def _plugins() -> Any:
    """What installed packages brought, and plug-ins that could not be loaded; None where there are none."""
    table = _table("From a plug-in", "Package", "State")
    standard = {p.name for p in default_recipe()}
    for name, package in distributions().items():
        table.add_row(name, package, f"in the default pipeline, stage {stage_of(name)}" if name in standard else "runs where a recipe names it")
    packages = plugin_packages()
    for row in ops.rows():
        if package := packages.get(row.owner.partition(".")[0]):
            table.add_row(f"op {row.name}", package, row.summary)
    for kernel in registered():
        if package := packages.get(owner_of(kernel).partition(".")[0]):
            table.add_row(f"kernel {kernel.label}", package, f"for {kernel.op}, {kernel.precision}, on {kernel.device}")
    for b in broken_plugins():
        table.add_row(b.name, b.distribution, f"left out, it could not be loaded: {b.reason}")
    return table if table.row_count else None


def _one(kind: type[Pass]) -> Iterator[Any]:
    from rich.text import Text

    stage, package = stage_of(kind.name), distributions().get(kind.name)
    facts = [str(kind.numerics), f"stage {stage}" if stage else "", f"a plug-in of {package}" if package else ""]
    yield Text(f"{kind.name} ({', '.join(f for f in facts if f)})", style="bold")
    yield Text(inspect.getdoc(kind) or "")
    table = _table("Option", "Type", "Default")
    for f in fields(kind):
        if f.name == "origin":
            continue
        table.add_row(f.name, f.type if isinstance(f.type, str) else f.type.__name__, _default(f))
    yield table


def _options(kind: type[Pass]) -> list[Field[Any]]:
    return [f for f in fields(kind) if f.name not in COMMON]


def _default(f: Field[Any]) -> str:
    if f.default is not MISSING:
        return repr(f.default)
    return repr(f.default_factory()) if f.default_factory is not MISSING else "(needed)"


def _spelled(p: Pass) -> str:
    """A pass with the options that are not at their defaults: `quantize(mode='dynamic')`."""
    chosen = [f"{f.name}={getattr(p, f.name)!r}" for f in _options(type(p)) if getattr(p, f.name) != f.default]
    return p.name + (f"({', '.join(chosen)})" if chosen else "")


def _table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for k, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=k == 0)
    return table
