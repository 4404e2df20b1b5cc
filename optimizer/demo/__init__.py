"""Demos on real pretrained weights and real labelled data, fetched by package name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from graphwright.demo.task import DemoTask
from graphwright.errors import InputError, nearest

#: The module of each task, and the packages of the `demo` extra that it imports.
TASKS = {
    "minilm": ("graphwright.demo.minilm", ("transformers", "tokenizers")),
    "cnn": ("graphwright.demo.cnn", ("h5py", "PIL")),
}


def load_task(name: str, progress: Callable[[str], None] | None = None) -> DemoTask:
    """The demo task called `name`; fetches what it needs on the first call.

    Raises:
        InputError: no task has that name, or a package of the `demo` extra is not installed.
        AssetError: weights or data could not be fetched.
    """
    if name not in TASKS:
        raise InputError(f"no demo is called {name!r}; there are {', '.join(TASKS)}", hint=nearest(name, TASKS) or None)
    module, packages = TASKS[name]
    if missing := [p for p in packages if find_spec(p) is None]:
        raise InputError(f"the {name} demo needs {' and '.join(missing)}", hint="pip install 'graphwright[demo]'")
    return import_module(module).task(progress=progress)
