"""Ops and kernels that other packages register: a file says what it needs of them, in words that are shown and never followed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from graphwright import ops
from graphwright.errors import LoadError
from graphwright.ir import Program, op_name

_WORDS = re.compile(r"[\w.+\- ]{1,100}\Z")


def needs(programs: Iterable[Program]) -> dict[str, list[str]]:
    """Op → the module that registered it, and the package that the module belongs to (empty: none is installed)."""
    rows = {op_name(n.target): row for p in programs for n in p.nodes if (row := ops.row(n.target)) is not None and row.owner}
    return {name: [row.owner, _distribution(row.owner)] for name, row in rows.items()}


def _distribution(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    for name in packages_distributions().get(module.partition(".")[0], ()):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""


def require(wanted: Any, where: str) -> None:
    """Every op that a file needs is registered; installed plug-ins are loaded for it, and nothing is imported by the file's word.

    Raises:
        LoadError: one is not; names it and what to import.
    """
    if not isinstance(wanted, dict) or not _missing(wanted):
        return
    from graphwright.passes.pipeline import load_plugins

    load_plugins()
    for name in _missing(wanted):
        module, package = (wanted[name] + ["", ""])[:2] if isinstance(wanted[name], list) else ("", "")
        source = f"import {module}" if _shown(module) and module != "__main__" else "run the code that calls gw.register_op for it"
        owner = f" (package {package})" if _shown(package) and package else ""
        said = f"the op {name!r}" if _shown(name) else "an op of another package"
        raise LoadError(f"{where} needs {said}, which is not registered in this process", hint=f"First {source}{owner}, then load the file again.")


def _missing(wanted: dict[str, Any]) -> list[str]:
    found = {name: ops.resolve(name) if _shown(name) and name.count(".") in (1, 2) else None for name in wanted}
    return [name for name, target in found.items() if target is None or ops.row(target) is None]


def _shown(word: Any) -> bool:
    return isinstance(word, str) and (not word or _WORDS.match(word) is not None)
