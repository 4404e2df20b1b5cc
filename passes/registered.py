"""Passes from outside: what was registered, where it joins the default pipeline, and the plug-ins of installed packages.

The order is a graph: the default pipeline is a chain, and each registered pass adds the edges that it asked for. It is
solved by a topological sort that keeps every pass as near as possible to the neighbour it named, in order of registration.
"""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphwright.errors import RecipeError, nearest
from graphwright.manager import Origin, Pass
from graphwright.numerics import Exact, Lossy

#: Entry-point group under which installed packages offer passes, or functions and modules that register them.
GROUP = "graphwright.passes"


@dataclass(frozen=True)
class Added:
    """A registered pass.

    Attributes:
        after, before: the passes that it asked to stand behind, and in front of.
        stage: the stage of the default pipeline that it asked to run in.
        distribution: the installed package that brought it as a plug-in, with its version; None: registered by the program.
    """

    cls: type[Pass]
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    stage: str | None = None
    distribution: str | None = None

    @property
    def joins(self) -> bool:
        """Whether it is a part of the default pipeline; else it is known by its name alone."""
        return bool(self.after or self.before or self.stage)

    @property
    def asked(self) -> str:
        """The registration in words."""
        options = [f"{k}={_brief(v)}" for k, v in (("after", self.after), ("before", self.before), ("stage", self.stage)) if v]
        by = f" of {self.distribution}" if self.distribution else ""
        return f"register_pass({self.cls.__name__}, {', '.join(options)}){by}"


@dataclass(frozen=True)
class Broken:
    """A plug-in that could not be loaded."""

    name: str
    value: str
    distribution: str
    reason: str

    def __str__(self) -> str:
        return f"plug-in {self.name!r} ({self.value}) of {self.distribution} is left out, it could not be loaded: {self.reason}"


def _brief(names: str | tuple[str, ...]) -> str:
    return repr(names[0] if isinstance(names, tuple) and len(names) == 1 else names)


def names_of(value: str | Sequence[str] | None, option: str, where: str) -> tuple[str, ...]:
    """Names of passes as a tuple.

    Raises:
        RecipeError: it is no name and no sequence of names.
    """
    if value is None:
        return ()
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (tuple, list)) or not all(isinstance(n, str) and n for n in found):
        raise RecipeError(f"{option}={value!r} is no name of a pass", where=where, hint=f"Write {option}='fold-constants', or a tuple of names.")
    return tuple(dict.fromkeys(found))


# -- order -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """The default pipeline as it stands, to be joined by registered passes.

    Attributes:
        fixed: the built-in passes' names, in order.
        stages: name of a stage → the built-in pass that it begins with, in order.
    """

    fixed: tuple[str, ...]
    stages: Mapping[str, str]

    def stage_of(self, name: str) -> str:
        """The stage that a built-in pass belongs to."""
        place, found = self.fixed.index(name), ""
        for stage, first in self.stages.items():
            if self.fixed.index(first) <= place:
                found = stage
        return found

    def _span(self, stage: str) -> tuple[str | None, str, str | None]:
        """The last built-in pass before a stage, the last one in it, and the first one behind it."""
        inside = [k for k, n in enumerate(self.fixed) if self.stage_of(n) == stage]
        low, high = inside[0], inside[-1]
        return self.fixed[low - 1] if low else None, self.fixed[high], self.fixed[high + 1] if high + 1 < len(self.fixed) else None

    def sorted(self, added: Mapping[str, Added]) -> list[str]:
        """Names of all passes in an order that holds what every registered one asked for.

        Raises:
            RecipeError: no order does; the message shows the cycle, and who asked for each of its edges.
        """
        import networkx as nx

        joining = {n: a for n, a in added.items() if a.joins}
        graph = nx.DiGraph()
        graph.add_nodes_from(self.fixed)
        for one, other in zip(self.fixed, self.fixed[1:], strict=False):
            graph.add_edge(one, other, who="the default pipeline's own order")
        for name, a in joining.items():
            before, _, behind = self._span(a.stage) if a.stage else (None, "", None)
            graph.add_node(name)
            for other in (*a.after, *((before,) if before else ())):
                graph.add_edge(other, name, who=a.asked)
            for other in (*a.before, *((behind,) if behind else ())):
                graph.add_edge(name, other, who=a.asked)
        try:
            cycle = nx.find_cycle(graph)
        except nx.NetworkXNoCycle:
            places = self._places(joining)
            return list(nx.lexicographical_topological_sort(graph, key=places.__getitem__))
        raise RecipeError(_cycle_text([(a, b, graph.edges[a, b]["who"]) for a, b in cycle], set(self.fixed)),
                          where="register_pass", hint="Leave one of these wishes out, or unregister one of the passes.")  # fmt: skip

    def _places(self, joining: Mapping[str, Added]) -> dict[str, tuple[int, ...]]:
        """Where each pass would stand if nothing else mattered: 0 sorts in front of, 1 at, 2 behind what came before it."""
        paths: dict[str, tuple[int, ...]] = {n: (k,) for k, n in enumerate(self.fixed)}
        turn = {n: k for k, n in enumerate(joining)}

        def path(name: str) -> tuple[int, ...]:
            if name not in paths:
                a = joining[name]
                behind = a.after or ((self._span(a.stage)[1],) if a.stage and not a.before else ())
                if behind:
                    paths[name] = (*max((path(n) for n in behind), key=lambda p: (*p, 1)), 2, turn[name])
                else:
                    paths[name] = (*min((path(n) for n in a.before), key=lambda p: (*p, 1)), 0, turn[name])
            return paths[name]

        return {n: (*path(n), 1) for n in (*self.fixed, *joining)}


def _cycle_text(edges: Sequence[tuple[str, str, str]], fixed: set[str]) -> str:
    """``a -> b -> a``, runs of built-in passes shortened to their ends, and a line per edge."""
    start = next((k for k, (a, _, _) in enumerate(edges) if a not in fixed), 0)
    merged: list[tuple[str, str, str]] = []
    for a, b, who in (*edges[start:], *edges[:start]):
        if merged and {merged[-1][0], merged[-1][1], a, b} <= fixed:
            merged[-1] = (merged[-1][0], b, who)
        else:
            merged.append((a, b, who))
    shown = " -> ".join([merged[0][0], *(b for _, b, _ in merged)])
    return f"the order of passes goes round in a circle: {shown}" + "".join(f"\n    {a} before {b}: {who}" for a, b, who in merged)


# -- the registry ----------------------------------------------------------------------------------------------------


class Registry:
    """Registered passes by name, and the plug-ins that were found."""

    def __init__(self, order: Order, taken: Iterable[str]):
        self.order = order
        self.taken = frozenset(taken)
        self.added: dict[str, Added] = {}
        self.broken: list[Broken] = []
        self.packages: dict[str, str] = {}  # of the plug-ins that were loaded: top-level module → distribution
        self._loading: str | None = None
        self._loaded = False

    def add(self, cls: Any, after: Any, before: Any, stage: Any) -> None:
        """See ``register_pass``; where it raises, nothing has changed."""
        where = f"register_pass({cls.__name__})" if isinstance(cls, type) else "register_pass"
        check_class(cls, where)
        entry = Added(cls, names_of(after, "after", where), names_of(before, "before", where), stage, self._loading)
        self._check_name(entry, where)
        self._check_neighbours(entry, where)
        if entry.distribution and entry.joins and isinstance(cls.numerics, Lossy):
            raise RecipeError(f"{cls.name!r} changes numbers, and the default pipeline of everyone who has this plug-in must not",
                              where=where, hint="Register it without after, before and stage: users ask for it by its name.")  # fmt: skip
        instance_of(cls)
        self.order.sorted(standing({**self.added, cls.name: entry}, self.order.fixed)[0])
        self.added[cls.name] = entry

    def _check_name(self, entry: Added, where: str) -> None:
        name, other = entry.cls.name, self.added.get(entry.cls.name)
        if name in self.taken:
            raise RecipeError(f"the name {name!r} is taken by Graphwright itself", where=where, hint='Choose another: name = "my-pass".')
        if other is not None and _package(other.cls) != _package(entry.cls):
            owner = f"{other.cls.__module__}.{other.cls.__qualname__}" + (f" of {other.distribution}" if other.distribution else "")
            raise RecipeError(f"the name {name!r} is taken by {owner}", where=where,
                              hint=f"Choose another name, or call graphwright.passes.pipeline.unregister_pass({name!r}) first.")  # fmt: skip

    def _check_neighbours(self, entry: Added, where: str) -> None:
        names = [*self.order.fixed, *(n for n, a in self.added.items() if a.joins and n != entry.cls.name)]
        for neighbour in (*entry.after, *entry.before):
            if neighbour not in names:
                raise RecipeError(f"no pass {neighbour!r} is in the default pipeline", where=where,
                                  hint=nearest(neighbour, names) or f"It holds {', '.join(names)}.")  # fmt: skip
        if entry.stage is not None and entry.stage not in self.order.stages:
            raise RecipeError(f"there is no stage {entry.stage!r}", where=where, hint=f"The stages are {', '.join(self.order.stages)}.")

    def pipeline(self, built_in: Mapping[str, Pass]) -> list[Pass]:
        """The default pipeline with the passes that joined it; those whose neighbour was unregistered are left out with a warning."""
        joining, gone = standing(self.added, built_in)
        for name, missing in gone.items():
            warnings.warn(f"pass {name!r} is left out: its neighbour {missing!r} is gone", stacklevel=3)
        if not joining:
            return list(built_in.values())
        made = {n: p for n, a in joining.items() if (p := self._joined(a)) is not None}
        return [built_in[n] if n in built_in else made[n] for n in self.order.sorted(joining) if n in built_in or n in made]

    def _joined(self, entry: Added) -> Pass | None:
        if entry.distribution is None:
            return instance_of(entry.cls)
        try:
            return _marked(instance_of(entry.cls), Origin(entry.distribution, asked=False))
        except Exception as error:  # noqa: BLE001  nobody asked for it
            warnings.warn(f"pass {entry.cls.name!r} of {entry.distribution} is left out: {type(error).__name__}: {error}", stacklevel=3)
            return None

    def asked(self, p: Pass) -> Pass:
        """A pass that the user named or gave, with the plug-in that it comes from."""
        entry = self.added.get(p.name)
        if p.origin is not None or entry is None or entry.distribution is None or entry.cls is not type(p):
            return p
        return _marked(p, Origin(entry.distribution))

    # -- plug-ins --------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load what installed packages offer, once; what can't be loaded is left out with a warning that names its package."""
        if self._loaded:
            return
        self._loaded = True
        from importlib.metadata import entry_points

        waiting, failed = list(entry_points(group=GROUP)), {}
        while waiting:  # one plug-in may name a pass of another: as long as that helps, try again
            failed = {point: error for point in waiting if (error := self._load(point)) is not None}
            waiting = [p for p, error in failed.items() if isinstance(error, RecipeError)] if len(failed) < len(waiting) else []
            if len(waiting) < len(failed):
                self._complain({p: e for p, e in failed.items() if p not in waiting})

    def _complain(self, failed: Mapping[Any, BaseException]) -> None:
        for point, error in failed.items():
            self.broken.append(Broken(point.name, point.value, distribution_of(point), f"{type(error).__name__}: {error}"))
            warnings.warn(str(self.broken[-1]), stacklevel=5)

    def _load(self, point: Any) -> BaseException | None:
        """Let one plug-in register what it has; the error where it can't."""
        before, self._loading = dict(self.added), distribution_of(point)
        try:
            found = point.load()
            if isinstance(found, type) and issubclass(found, Pass):
                if found.name not in self.added:
                    self.add(found, None, None, None)
            elif not isinstance(found, types.ModuleType):
                if not callable(found):
                    raise RecipeError(f"{point.value} is a {type(found).__name__}; a Pass, a function or a module is wanted")
                found()
            module = str(point.value).partition(":")[0].strip()
            self._claim(module, self._loading)
            self.packages[module.partition(".")[0]] = self._loading
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it does, it is not the user's affair
            self.added.clear()
            self.added.update(before)
            return error
        finally:
            self._loading = None
        return None

    def _claim(self, module: str, distribution: str) -> None:
        """Passes that were registered when the plug-in's package was imported earlier are the plug-in's, too."""
        for name, a in self.added.items():
            if a.distribution is None and _package(a.cls) == module.partition(".")[0]:
                self.added[name] = replace(a, distribution=distribution)

    def hint(self, name: str) -> str | None:
        """Why a pass that a plug-in was to offer is unknown, where that is so."""
        found = [b for b in self.broken if b.name == name] or self.broken
        return "\n  ".join(str(b) for b in found) or None


def standing(added: Mapping[str, Added], fixed: Iterable[str]) -> tuple[dict[str, Added], dict[str, str]]:
    """The passes that join the default pipeline, and those that can't since a neighbour (named) is no part of it any more."""
    joining, names, lost = {n: a for n, a in added.items() if a.joins}, set(fixed), {}
    while gone := {n: m for n, a in joining.items() for m in (*a.after, *a.before) if m not in names and m not in joining}:
        lost.update(gone)
        joining = {n: a for n, a in joining.items() if n not in gone}
    return joining, lost


def distribution_of(point: Any) -> str:
    """``"name version"`` of the package that an entry point belongs to."""
    dist = getattr(point, "dist", None)
    return f"{dist.name} {dist.version}" if dist is not None else "an unknown package"


def check_class(cls: Any, where: str) -> None:
    """What may be registered: a named class of passes.

    Raises:
        RecipeError: it is something else.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise RecipeError(f"{cls!r} is no Pass", where="register_pass",
                          hint="Register the class itself: a subclass of gw.Pass or gw.RewritePass.")  # fmt: skip
    if not isinstance(cls.name, str) or not cls.name:
        raise RecipeError(f"{cls.__name__} has no name", where=where, hint='Give it a class attribute: name = "my-pass".')
    if not isinstance(cls.numerics, (Exact, Lossy)):
        raise RecipeError(f"{cls.__name__}.numerics is {cls.numerics!r}", where=where, hint="Write numerics = gw.Exact() or gw.Lossy(floor_db).")


def instance_of(cls: type[Pass]) -> Pass:
    """A pass with its options at their defaults.

    Raises:
        RecipeError: an option has none.
    """
    try:
        return cls()
    except TypeError as error:
        raise RecipeError(f"{cls.__name__} needs options: {error}", where="recipe",
                          hint=f"Give every option a default, or pass {cls.__name__}(...) itself in a list.") from error  # fmt: skip


def _marked(p: Pass, origin: Origin) -> Pass:
    try:
        return dataclasses.replace(p, origin=origin)
    except TypeError:  # an __init__ of its own
        object.__setattr__(p, "origin", origin)
        return p


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def guests(passes: Iterable[Pass]) -> Iterator[Pass]:
    """The passes that joined by themselves, as plug-ins."""
    return (p for p in passes if p.origin is not None and not p.origin.asked)
