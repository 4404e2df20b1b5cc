"""The default pipeline, the recipes, and the passes that users add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from graphwright.errors import RecipeError, nearest
from graphwright.manager import Pass
from graphwright.passes.allow_half import AllowHalf
from graphwright.passes.canonicalize import Canonicalize
from graphwright.passes.common_subexpressions import CommonSubexpressions
from graphwright.passes.dead_code import DeadCode
from graphwright.passes.fold_batch_norm import FoldBatchNorm
from graphwright.passes.fold_constants import FoldConstants
from graphwright.passes.fold_padding import FoldPadding
from graphwright.passes.fold_scale import FoldScale
from graphwright.passes.fold_shift import FoldShift
from graphwright.passes.fold_uniform import FoldUniform
from graphwright.passes.fuse_epilogue import FuseEpilogue
from graphwright.passes.group_queries import GroupQueries
from graphwright.passes.layout import Layout
from graphwright.passes.merge_convolutions import MergeConvolutions
from graphwright.passes.merge_heads import MergeHeads
from graphwright.passes.merge_linears import MergeLinears
from graphwright.passes.merge_products import MergeProducts
from graphwright.passes.quantize import Quantize
from graphwright.passes.raise_activations import RaiseActivations
from graphwright.passes.raise_attention import RaiseAttention
from graphwright.passes.raise_einsum import RaiseEinsum
from graphwright.passes.raise_linear import RaiseLinear
from graphwright.passes.raise_norms import RaiseNorms
from graphwright.passes.raise_softmax import RaiseSoftmax
from graphwright.passes.registered import Broken, Order, Registry, instance_of
from graphwright.passes.select_early import SelectEarly
from graphwright.passes.simplify_arithmetic import SimplifyArithmetic
from graphwright.passes.simplify_masks import SimplifyMasks
from graphwright.passes.simplify_parts import SimplifyParts
from graphwright.passes.widen import Widen

#: What every recipe starts with: the same numbers up to float rounding.
DEFAULT: tuple[Pass, ...] = (
    Canonicalize(),          # one spelling of everything, nothing that computes nothing: all others rely on it
    Widen(),                 # before anything looks for ops that kernels serve: on a CPU those are made for float32
    RaiseEinsum(),           # products by their own name: linears and attention are looked for next
    RaiseLinear(),           # before constants are folded: a transposed weight is a linear's weight as it stands
    RaiseSoftmax(),          # exponentials over their sum: attention is looked for by its softmax
    RaiseAttention(),        # while products and softmax still stand apart; the masks it builds are folded next
    FoldConstants(),         # positions, masks, tables: what follows sees numbers where there were ops
    CommonSubexpressions(),  # a mean computed twice would hide a layer norm
    SimplifyParts(),         # before anything asks who reads a value: a concatenation that is taken apart is no reader
    RaiseActivations(),      # gelu in eight ops becomes one that an epilogue can take in
    RaiseNorms(),            # RMS norm in six ops becomes one
    SimplifyArithmetic(),    # after everything that reads arithmetic as people write it
    SimplifyMasks(),         # needs masks as constants
    FoldUniform(),           # masks whose size varies are no constants, and may be of ones all the same
    FoldPadding(),           # a convolution that pads by itself, before batch norm asks whether it pads
    FoldBatchNorm(),         # before activations are drawn in: a norm behind an activation cannot be folded
    FoldShift(),             # the same for biases that stand apart and images' means, past the factors that go next
    FoldScale(),             # layer scale, scaled queries, pixels over 255
    MergeProducts(),         # once factors and norms between two products are gone
    SelectEarly(),           # once norms are folded, a mean may find its convolution; before ops become ours
    Layout(),                # transposes that cancel would stand between a linear and its residual add
    MergeHeads(),            # once transposes have met: attention hands its result to a linear
    GroupQueries(),          # after both kinds of attention have their final form: neither then copies shared keys
    FuseEpilogue(),          # every matrix op in one form, with what follows it
    MergeConvolutions(),     # with the activations that they have by now: branches that differ in it stay apart
    MergeLinears(),          # last, since only linears without an epilogue of their own may be merged
    DeadCode(),              # what the others left behind
)  # fmt: skip

#: What a recipe adds to the default pipeline, and its line in the list of recipes.
RECIPES: dict[str, tuple[tuple[Pass, ...], str]] = {
    "default": ((), "same numbers up to float rounding"),
    "bf16": ((AllowHalf(dtypes=("bf16",)),), "bfloat16 where it measures faster and errs little, site by site"),
    "half": ((AllowHalf(),), "the same with bfloat16 and float16, whichever serves a site better"),
    "int8": ((Quantize(),), "int8 weights and activations, ranges from calibration data"),
    "int8-dynamic": ((Quantize(mode="dynamic"),), "int8 weights and activations, ranges computed at run time"),
    "w8": ((Quantize(mode="weight-only", embeddings=True),), "int8 weights alone, embedding tables among them"),
    "w4": ((Quantize(mode="weight-only", bits=4, group=128, embeddings=True),), "4-bit weights of linears, 128 under a scale; tables and the rest as int8"),
}

#: The stages of the default pipeline: name → (the pass that a stage begins with, what it is for).
STAGES: dict[str, tuple[str, str]] = {
    "prepare": ("canonicalize", "one spelling, constants folded"),
    "raise": ("raise-activations", "ops that together spell one op become that op"),
    "fold": ("fold-padding", "paddings, norms and scales go into weights"),
    "fuse": ("layout", "transposes meet, matrix ops take in what follows them"),
    "finish": ("dead-code", "what the others left behind is cleared away"),
}

P = TypeVar("P", bound=type[Pass])


def register_pass(cls: P | None = None, *, after: str | Sequence[str] | None = None,
                  before: str | Sequence[str] | None = None, stage: str | None = None) -> Any:  # fmt: skip
    """Let a pass join the default pipeline, and make it known by its name::

        @gw.register_pass(after="fold-batch-norm")
        class FuseSquaredRelu(gw.RewritePass): ...

    Registering a pass of the same name again replaces it, as long as both come from one package.

    Args:
        after, before: names of passes that it must stand behind, and in front of; it stands right beside the nearest.
        stage: name of a stage of the default pipeline that it must run in; by default at its end. ``graphwright passes``
            shows the stages. Without any of the three the pass is only made known.

    Raises:
        RecipeError: it is no pass, its name is missing or taken, a neighbour or stage does not exist, or the order goes
            round in a circle: the message shows it. Nothing was registered then.
    """

    def add(cls: P) -> P:
        _registry.add(cls, after, before, stage)
        return cls

    return add if cls is None else add(cls)


def unregister_pass(name: str) -> None:
    """Undo ``register_pass``."""
    _registry.added.pop(name, None)


def default_recipe() -> tuple[Pass, ...]:
    """The default pipeline with the passes that joined it."""
    load_plugins()
    return tuple(_registry.pipeline({p.name: p for p in DEFAULT}))


def recipes() -> dict[str, tuple[Pass, ...]]:
    """Every recipe by name: the default pipeline and what the recipe adds."""
    start = default_recipe()
    return {name: (*start, *extra) for name, (extra, _) in RECIPES.items()}


def known_passes() -> dict[str, type[Pass]]:
    """Every pass by name: those of the recipes, and registered ones."""
    load_plugins()
    return {**_built_in(), **{name: a.cls for name, a in _registry.added.items()}}


def distributions() -> dict[str, str]:
    """The installed package, with its version, of every pass that a plug-in brought."""
    load_plugins()
    return {name: a.distribution for name, a in _registry.added.items() if a.distribution}


def plugin_packages() -> dict[str, str]:
    """The installed package, with its version, of every top-level module that a plug-in was loaded from."""
    load_plugins()
    return dict(_registry.packages)


def broken_plugins() -> tuple[Broken, ...]:
    """Plug-ins that could not be loaded, and why."""
    load_plugins()
    return tuple(_registry.broken)


def stage_of(name: str) -> str | None:
    """The stage of the default pipeline in which a pass runs; None where it is no part of it."""
    found = None
    for p in default_recipe():
        found = _registry.order.stage_of(p.name) if p.name in _registry.order.fixed else found
        if p.name == name:
            asked = _registry.added.get(name)
            return (asked.stage if asked else None) or found or next(iter(STAGES))
    return None


def resolve(recipe: str | Pass | Sequence[str | Pass]) -> tuple[Pass, ...]:
    """The passes that a recipe stands for: a name of a recipe or a pass, a pass, or a sequence of these.

    Raises:
        RecipeError: a name does not exist (the nearest ones are named), or something is no pass.
    """
    if isinstance(recipe, str):
        return _named(recipe)
    if isinstance(recipe, Pass):
        return (_registry.asked(recipe),)
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
        return (_registry.asked(instance_of(passes[name])),)
    hint = _registry.hint(name) or nearest(name, [*RECIPES, *passes]) or f"Recipes: {', '.join(RECIPES)}. Passes: {', '.join(passes)}."
    raise RecipeError(f"there is no recipe or pass {name!r}", where="recipe", hint=hint)


def _built_in() -> dict[str, type[Pass]]:
    every = [*DEFAULT, *(p for extra, _ in RECIPES.values() for p in extra)]
    return {p.name: type(p) for p in every}


def load_plugins() -> None:
    """Load the passes that installed packages offer under the entry-point group ``graphwright.passes``, once.

    An entry point names a pass, a function that registers things, or a module that does so when it is imported. A plug-in
    that cannot be loaded is left out with a warning that names its package.
    """
    _registry.load()


_registry = Registry(Order(tuple(p.name for p in DEFAULT), {n: first for n, (first, _) in STAGES.items()}), {*_built_in(), *RECIPES})
