"""Imports go down the floors of the architecture only; a new module needs a floor."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"optimizer": "graphwright", "passes": "graphwright.passes", "kernels": "graphwright.kernels"}

#: Modules by floor; a package stands for what is in it.
FLOORS = [
    ["errors"],
    ["difference", "drawing", "ir", "inference", "invariants", "nodes", "ops", "outline", "output", "sizes", "snapshot", "source", "structure"],
    ["rewrite", "manager", "kernel", "kernel_registry", "accelerator", "cost", "measure", "memory", "numerics", "oracle", "cache", "calibrate", "cut"],
    ["capture", "kernels"],
    ["passes"],
    ["backends", "lower"],
    ["search", "store", "report"],
    ["api", "bisecting", "comparing", "meters", "explaining", "repro", "optimized", "profiling", "saving", "reporting", "checkup", "cli", "cli_options", "console", "userfile", "listing", "demo", "microbench", "testing", "dynamo", "decode"],
]  # fmt: skip
FLOOR = {f"graphwright.{name}": k for k, names in enumerate(FLOORS) for name in names} | {"graphwright": len(FLOORS) - 1}


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _floor(module: str) -> int | None:
    """The floor of a module: `graphwright.a.b` stands where `graphwright.a` does."""
    return FLOOR.get(".".join(module.split(".")[:2]))


def _imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every absolute import in a file, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, "." * node.level))
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in MODULES else str(node.module)) for name in inner]
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    floor, path = _floor(module), MODULES[module]
    assert floor is not None, f"{path} stands on no floor: add it to FLOORS and to the architecture's description"
    for line, name in _imports(path):
        place = f"{path.relative_to(ROOT)}:{line}"
        assert not name.startswith("."), f"{place}: imports are absolute"
        if name.split(".")[0] == "graphwright":
            target = _floor(name)
            assert target is not None and target <= floor, f"{place}: {module} (floor {floor}) imports {name} (floor {target})"
        if module.startswith("graphwright.passes"):
            assert not name.startswith("graphwright.kernels"), f"{place}: a pass emits ops; lowering chooses kernels"
        if name.split(".")[0] in {"triton", "llvmlite"}:
            assert module.startswith("graphwright.kernels"), f"{place}: only kernels import {name}"


def test_the_table_names_no_module_that_has_gone():
    assert [name for name in FLOOR if name not in MODULES] == []
