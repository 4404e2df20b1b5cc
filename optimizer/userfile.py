"""Objects that the command line names: `path/to/file.py:name`, `package.module:name`, and inputs as shapes."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from graphwright.errors import GraphwrightError, InputError, nearest

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dims>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool)
}  # fmt: skip


def resolve(target: str, option: str) -> Any:
    """The object that `target` names.

    Args:
        target: `path/to/file.py:name` or `package.module:name`; the name may be dotted.
        option: the command-line option it came from, for messages.

    Raises:
        InputError: the file, the module or the name does not exist, or the file fails while it is imported.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise InputError(f"{target!r} does not say which object", where=option, hint="Write path/to/file.py:name.")
    found: Any = _import(place, option)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_")]
            raise InputError(
                f"{place} has no {name!r}", where=option, hint=nearest(part, names) or f"it has {', '.join(names)}"
            )
        found = getattr(found, part)
    return found


def call(target: str, option: str, function: Callable[[], Any]) -> Any:
    """`function()`; what the user's own code raises becomes an error that names its file and line."""
    try:
        return function()
    except GraphwrightError:
        raise
    except Exception as error:
        raise InputError(f"{target} raised {type(error).__name__}: {error}", where=_place(error) or option) from error


def model_of(target: str) -> tuple[nn.Module, Any]:
    """A model and its example inputs (None if not given) from a factory that returns `model` or `(model, inputs)`."""
    found = resolve(target, "MODEL")
    made = found if isinstance(found, nn.Module) or not callable(found) else call(target, "MODEL", found)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{target} gives {type(model).__name__}, not a torch.nn.Module",
            where="MODEL",
            hint="Name a model, or a function that returns one or (model, example_inputs).",
        )
    return model, inputs


def value_of(target: str, option: str) -> Any:
    """The object, or what it returns if it is a function."""
    found = resolve(target, option)
    return call(target, option, found) if callable(found) and not isinstance(found, nn.Module) else found


def batches_of(target: str) -> Any:
    """Calibration inputs: what `value_of` gives; a generator is read here, so that its errors name the user's line."""
    found = value_of(target, "--calibrate")
    return call(target, "--calibrate", lambda: list(found)) if hasattr(found, "__next__") else found


def score_of(target: str) -> Callable[[Any], float]:
    """The function that scores a model, with its errors naming the user's line."""
    function = resolve(target, "--evaluate")
    if not callable(function):
        raise InputError(f"{target} is {type(function).__name__}, not a function", where="--evaluate")
    return lambda model: call(target, "--evaluate", lambda: function(model))


def inputs_of(specs: Sequence[str], seed: int = 0, model: nn.Module | None = None) -> tuple[Tensor, ...] | dict[str, Tensor] | Any:
    """Example inputs from `--inputs`.

    Args:
        specs: one `file.py:name`, or shapes such as `8x3x224x224`, `8x128:int64`, `mask=8x128:int64`. Floats are
            drawn from the normal distribution, integers and booleans from {0, 1}.
        seed: of the random numbers.
        model: what is drawn lies where its first parameter lies; on the CPU without one.

    Returns:
        The named object, a tuple for unnamed shapes, or a dict for named ones.
    """
    shapes = [_SHAPE.fullmatch(s) for s in specs]
    if len(specs) == 1 and shapes[0] is None and ":" in specs[0]:
        return value_of(specs[0], "--inputs")
    for spec, shape in zip(specs, shapes, strict=True):
        if shape is None:
            raise InputError(
                f"{spec!r} is neither a shape nor file.py:name",
                where="--inputs",
                hint="Write 1x3x224x224, 8x128:int64, input_ids=8x128:int64 or path/to/file.py:name.",
            )
    if len({bool(s["name"]) for s in shapes if s}) > 1:
        raise InputError(
            "some inputs have names and some have none", where="--inputs", hint="Name all of them or none."
        )
    names = [s["name"] for s in shapes if s]
    if any(names) and len(set(names)) < len(names):
        raise InputError(f"a name occurs twice in {', '.join(names)}", where="--inputs")
    random = torch.Generator().manual_seed(seed)
    home = next((p.device for p in model.parameters()), None) if model is not None else None
    tensors = [_draw(s["dims"], s["dtype"] or "float32", random).to(home) for s in shapes if s]
    return dict(zip(names, tensors, strict=True)) if any(names) else tuple(tensors)


def _draw(dims: str, dtype: str, random: torch.Generator) -> Tensor:
    if dtype not in _DTYPES:
        raise InputError(
            f"no dtype is called {dtype!r}",
            where="--inputs",
            hint=nearest(dtype, _DTYPES) or f"known: {', '.join(_DTYPES)}",
        )
    shape, kind = [int(d) for d in dims.split("x")], _DTYPES[dtype]
    if kind.is_floating_point:
        return torch.randn(shape, generator=random).to(kind)
    return torch.randint(0, 2, shape, generator=random).to(kind)


def _import(place: str, option: str) -> ModuleType:
    if not place.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return call(place, option, lambda: importlib.import_module(place))
        finally:
            sys.path.remove("")
    path = Path(place)
    if not path.is_file():
        raise InputError(f"{place} is not a file", where=option, hint="Paths are relative to the current folder.")
    # The same file named twice (model and calibration) is imported once.
    name = f"graphwright_user_{path.stem}_{abs(hash(path.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))  # files beside it can be imported, as with `python file.py`
    try:
        call(place, option, lambda: spec.loader.exec_module(module))
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _place(error: BaseException) -> str | None:
    """File and line of the innermost frame in the user's own files."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == __file__ or frame.filename.startswith(("<frozen", sys.base_prefix)):
            continue
        if "site-packages" not in Path(frame.filename).parts:
            return f"{frame.filename}:{frame.lineno}"
    return None
