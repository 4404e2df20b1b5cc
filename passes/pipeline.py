"""The default pipeline, the recipes, and the passes that users add."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from graphwright.errors import RecipeError, nearest
from graphwright.manager import Pass
from graphwright.passes.allow_bf16 import AllowBf16
from graphwright.passes.bisection import bisect as bisect  # noqa: PLC0414
from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.common_subexpressions import CommonSubexpressions
from graphwright.passes.dead_code import DeadCode
from graphwright.passes.fold_batch_norm import FoldBatchNorm
from graphwright.passes.fold_constants import FoldConstants
from graphwright.passes.fold_padding import FoldPadding
from graphwright.passes.fold_scale import FoldScale
from graphwright.passes.fuse_epilogue import FuseEpilogue
from graphwright.passes.layout import Layout
from graphwright.passes.merge_heads import MergeHeads
from graphwright.passes.merge_linears import MergeLinears
from graphwright.passes.quantize import Quantize
from graphwright.passes.raise_activations import RaiseActivations
from graphwright.passes.raise_attention import RaiseAttention
from graphwright.passes.raise_linear import RaiseLinear
from graphwright.passes.raise_norms import RaiseNorms
from graphwright.passes.simplify_masks import SimplifyMasks

#: What every recipe starts with: the same numbers up to float rounding.
DEFAULT: tuple[Pass, ...] = (
    Canonicalize(),          # one spelling of everything, nothing that computes nothing: all others rely on it
    RaiseLinear(),           # before constants are folded: a transposed weight is a linear's weight as it stands
    RaiseAttention(),        # while products and softmax still stand apart; the masks it builds are folded next
    FoldConstants(),         # positions, masks, tables: what follows sees numbers where there were ops
    CommonSubexpressions(),  # a mean computed twice would hide a layer norm
    RaiseActivations(),      # gelu in eight ops becomes one that an epilogue can take in
    RaiseNorms(),            # RMS norm in six ops becomes one
    SimplifyMasks(),         # needs masks as constants
    FoldPadding(),           # a convolution that pads by itself, before batch norm asks whether it pads
    FoldBatchNorm(),         # before activations are drawn in: a norm behind an activation cannot be folded
    FoldScale(),             # the same for layer scale and scaled queries
    Layout(),                # transposes that cancel would stand between a linear and its residual add
    MergeHeads(),            # once transposes have met: attention hands its result to a linear
    FuseEpilogue(),          # every matrix op in one form, with what follows it
    MergeLinears(),          # last, since only linears without an epilogue of their own may be merged
    DeadCode(),              # what the others left behind
)  # fmt: skip

#: What a recipe adds to the default pipeline, and its line in the list of recipes.
RECIPES: dict[str, tuple[tuple[Pass, ...], str]] = {
    "default": ((), "same numbers up to float rounding"),
    "bf16": ((AllowBf16(),), "bfloat16 where it measures faster"),
    "int8": ((Quantize(),), "int8 weights and activations, ranges from calibration data"),
    "int8-dynamic": ((Quantize(mode="dynamic"),), "int8 weights and activations, ranges computed at run time"),
    "w8": ((Quantize(mode="weight-only", embeddings=True),), "int8 weights alone, embedding tables among them"),
}

P = TypeVar("P", bound=type[Pass])


@dataclass(frozen=True)
class _Added:
    """A pass that joins the default pipeline after, or before, a named one; neither: known by name alone."""

    cls: type[Pass]
    after: str | None
    before: str | None


_added: dict[str, _Added] = {}


def register_pass(cls: P | None = None, *, after: str | None = None, before: str | None = None) -> Any:
    """Let a pass join the default pipeline, and make it known by its name::

        @gw.register_pass(after="fold-batch-norm")
        class FuseSquaredRelu(gw.RewritePass): ...

    Registering a pass of the same name again replaces it. Without ``after`` and ``before`` it is only made known.

    Raises:
        RecipeError: it is no pass, has no name or one of a built-in pass, or the neighbour does not exist.
    """

    def add(cls: P) -> P:
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise RecipeError(f"{cls!r} is no Pass", where="register_pass")
        if not cls.name:
            raise RecipeError(
                f"{cls.__name__} has no name",
                where="register_pass",
                hint='Give it a class attribute: name = "my-pass".',
            )
        if cls.name in _built_in() or cls.name in RECIPES:
            raise RecipeError(f"the name {cls.name!r} is taken", where=f"register_pass({cls.__name__})")
        if after and before:
            raise RecipeError(
                "after and before are given both", where=f"register_pass({cls.__name__})", hint="Give one of them."
            )
        neighbour = after or before
        names = [p.name for p in DEFAULT] + [n for n, a in _added.items() if a.after or a.before]
        if neighbour and (neighbour not in names or neighbour == cls.name):
            raise RecipeError(f"no pass {neighbour!r} is in the default pipeline", where=f"register_pass({cls.__name__})",
                              hint=nearest(neighbour, names) or f"It holds {', '.join(names)}.")  # fmt: skip
        _instance(cls)
        _added[cls.name] = _Added(cls, after, before)
        return cls

    return add if cls is None else add(cls)


def unregister_pass(name: str) -> None:
    """Undo ``register_pass``."""
    _added.pop(name, None)


def default_recipe() -> tuple[Pass, ...]:
    """The default pipeline with the passes that joined it."""
    load_plugins()
    passes = list(DEFAULT)
    for name, added in _added.items():
        names = [p.name for p in passes]
        place = (
            names.index(added.after) + 1
            if added.after in names
            else names.index(added.before)
            if added.before in names
            else None
        )
        if place is not None:
            while (
                added.after
                and place < len(passes)
                and getattr(_added.get(passes[place].name), "after", None) == added.after
            ):
                place += 1  # in order of registration
            passes.insert(place, _instance(added.cls))
        elif added.after or added.before:
            warnings.warn(
                f"pass {name!r} is left out: its neighbour {added.after or added.before!r} is gone", stacklevel=2
            )
    return tuple(passes)


def recipes() -> dict[str, tuple[Pass, ...]]:
    """Every recipe by name: the default pipeline and what the recipe adds."""
    start = default_recipe()
    return {name: (*start, *extra) for name, (extra, _) in RECIPES.items()}


def known_passes() -> dict[str, type[Pass]]:
    """Every pass by name: those of the recipes, and registered ones."""
    load_plugins()
    return {**_built_in(), **{name: a.cls for name, a in _added.items()}}


def resolve(recipe: str | Pass | Sequence[str | Pass]) -> tuple[Pass, ...]:
    """The passes that a recipe stands for: a name of a recipe or a pass, a pass, or a sequence of these.

    Raises:
        RecipeError: a name does not exist (the nearest ones are named), or something is no pass.
    """
    if isinstance(recipe, str):
        return _named(recipe)
    if isinstance(recipe, Pass):
        return (recipe,)
    if isinstance(recipe, type) and issubclass(recipe, Pass):
        raise RecipeError(
            f"{recipe.__name__} is a class, not a pass", where="recipe", hint=f"Write {recipe.__name__}()."
        )
    if isinstance(recipe, (list, tuple)):
        return tuple(p for part in recipe for p in resolve(part))
    raise RecipeError(f"{type(recipe).__name__} is no recipe", where="recipe",
                      hint=f"Pass a name ({', '.join(RECIPES)}), a pass, or a sequence of these.")  # fmt: skip


def precisions(passes: Sequence[Pass]) -> frozenset[str]:
    """The precisions that lowering may choose among: ``"f32"``, and what the passes allow."""
    allowed = {"f32"}
    for p in passes:
        allowed |= getattr(p, "precisions", {"int8"} if isinstance(p, Quantize) else set())
    return frozenset(allowed)


def _named(name: str) -> tuple[Pass, ...]:
    if name in RECIPES:
        return recipes()[name]
    passes = known_passes()
    if name in passes:
        return (_instance(passes[name]),)
    hint = nearest(name, [*RECIPES, *passes]) or f"Recipes: {', '.join(RECIPES)}. Passes: {', '.join(passes)}."
    raise RecipeError(f"there is no recipe or pass {name!r}", where="recipe", hint=hint)


def _built_in() -> dict[str, type[Pass]]:
    every = [*DEFAULT, *(p for extra, _ in RECIPES.values() for p in extra)]
    return {p.name: type(p) for p in every}


def _instance(cls: type[Pass]) -> Pass:
    try:
        return cls()
    except TypeError as error:
        raise RecipeError(f"{cls.__name__} needs options: {error}", where="recipe",
                          hint=f"Give every option a default, or pass {cls.__name__}(...) itself in a list.") from error  # fmt: skip


@functools.cache
def load_plugins() -> None:
    """Load the passes that installed packages offer under the entry-point group ``graphwright.passes``, once.

    A plug-in that cannot be loaded is left out with a warning.
    """
    from importlib.metadata import entry_points

    for point in entry_points(group="graphwright.passes"):
        try:
            found: Any = point.load()
            if isinstance(found, type) and issubclass(found, Pass):
                if found.name not in _added:
                    register_pass(found)
            elif isinstance(found, Callable):  # type: ignore[arg-type]
                found()
        except Exception as error:  # noqa: BLE001
            warnings.warn(f"plug-in {point.name!r} ({point.value}) is left out, it could not be loaded: "
                          f"{type(error).__name__}: {error}", stacklevel=2)  # fmt: skip
