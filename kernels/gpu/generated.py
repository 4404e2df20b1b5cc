"""Generated Triton kernels: from a region's text (``graphwright.kernels.gpu.generate``) to a family of configs, and to a function of tensors.

    made = Generated(source)
    out, other = made([x, y])              # tensors of the sizes and strides that the region was made for
    made.family                            # plan, configs, estimate: for the tuner, ahead-of-time compilation, microbenchmarks

The text is kept as a Python file in the private cache folder, named by its content: Triton reads it there, and so can a person.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.cache import folder, write_atomic
from graphwright.kernel import Cost, Sample
from graphwright.kernels.gpu.generate import Source
from graphwright.kernels.gpu.launch import (
    Config,
    Estimate,
    Family,
    Launch,
    Plan,
    bucket,
    cdiv,
    power_of_two,
    unfit_device,
)

#: Numbers per thread that a row held in registers may take, all that live beside each other counted.
_REGISTERS = 128
#: Elements of a tile per thread: fewer leave loads too narrow, more leave too few programs.
_FEWEST, _MOST = 2, 32
_FLAT = tuple(Config.of(BLOCK=block, warps=warps, stages=1) for block, warps in ((256, 4), (512, 4), (1024, 4), (1024, 8), (2048, 8), (4096, 8)))
_LONG = tuple(Config.of(LONG=1, ROWS=1, BLOCK=block, warps=warps, stages=1) for block, warps in ((1024, 4), (2048, 8), (4096, 8), (4096, 16)))


def configs(source: Source) -> tuple[Config, ...]:
    """Every config that may be tried for a kernel; the first that fits is a sensible one."""
    if source.form == "flat":
        return _FLAT
    wide = power_of_two(source.columns)
    if source.form == "tiles":
        shapes = [(elements, min(wide, block), warps) for elements, warps in ((1024, 4), (2048, 4), (4096, 8)) for block in (256, 1024, 64)]
        return tuple(dict.fromkeys(Config.of(ROWS=max(1, elements // block), BLOCK=block, warps=w, stages=1) for elements, block, w in shapes))
    if source.beside:
        return _beside(source, wide)
    held = [Config.of(LONG=0, ROWS=rows, BLOCK=wide, warps=w, stages=1) for rows in ((1, 2, 4, 8, 16, 32) if source.rows > 1 else (1,)) for w in (1, 2, 4, 8, 16)]
    sound = [c for c in held if _fits(source, c) is None]
    return (*sound, *(c for c in _LONG if c["BLOCK"] < wide or not sound))


def _beside(source: Source, wide: int) -> tuple[Config, ...]:
    """Tiles of many rows: as wide as a row where that fits the registers, else going along it."""
    rows = [n for n in (32, 64, 128, 16, 256) if n <= max(16, power_of_two(source.rows))]
    held = [Config.of(LONG=0, ROWS=n, BLOCK=wide, warps=w, stages=1) for n in rows for w in (4, 8, 2, 16, 1)]
    long = [Config.of(LONG=1, ROWS=n, BLOCK=block, warps=w, stages=1) for n in rows[:4] for block, w in ((16, 4), (32, 4), (64, 8), (128, 8)) if block < wide]
    return (*(c for c in held if _fits(source, c) is None), *(c for c in long if _fits(source, c) is None)) or tuple(held[:1])


def _fits(source: Source, config: Config) -> str | None:
    if source.form != "rows" or config["LONG"] and not source.beside:
        return None
    elements = config["ROWS"] * config["BLOCK"]
    each = elements / (32 * config.warps)
    if each * source.held > _REGISTERS:
        return f"{elements} elements of {source.held} numbers each are too many for the registers of {config.warps} warps"
    if each < _FEWEST and config.warps > 1 or each > _MOST:
        return f"{each:.3g} elements for each thread of {config.warps} warps; {_FEWEST} to {_MOST} make sense"
    return None


@functools.lru_cache(512)
def functions(name: str, text: str) -> types.ModuleType:
    """The module of a kernel's text. Its file is written where it is not there, or not as it should be.

    Raises:
        OSError: it can't be written.
    """
    path = folder("triton-generated") / f"{name}.py"
    wanted = text.encode()
    with suppress(OSError):
        if path.read_bytes() == wanted:
            return _module(name, path)
    write_atomic(path, wanted)
    return _module(name, path)


def _module(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"graphwright.kernels.gpu.regions.{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # Triton looks for it there
    spec.loader.exec_module(module)
    return module


class Generated:
    """A generated kernel, ready to be called; Triton compiles it on its first call, or reads it from its own cache.

    Attributes:
        family: its configs, estimates and plans. It is no op's: its arguments are the region's inputs.
    """

    def __init__(self, source: Source):
        self.source = source
        self._plain = [torch.empty(shape, dtype=dtype, device="meta").stride() == strides for shape, strides, dtype in source.outs]
        chosen = configs(source)
        self.family = Family(
            "graphwright.generated", self.plan, chosen, self.supports, self.estimate, self.bucket, self.cost, _no_samples, _no_samples,
            lambda config, *args: None if config in chosen else _fits(source, config), precision="f32", name=source.name)  # fmt: skip

    @property
    def path(self) -> Path:
        """Where its text lies on this machine."""
        return Path(str(functions(self.source.name, self.source.text).__file__))

    def warm(self) -> None:
        """Write its file and read it as Triton will."""
        functions(self.source.name, self.source.text)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.family.run(*tensors)

    def plan(self, *tensors: Tensor, config: Config) -> Plan:
        """One launch; the results lie as the region's ops would leave them."""
        source = self.source
        outs = [torch.empty(shape, dtype=dtype, device=tensors[0].device) if plain else torch.empty_strided(shape, strides, dtype=dtype, device=tensors[0].device)
                for (shape, strides, dtype), plain in zip(source.outs, self._plain, strict=True)]  # fmt: skip
        long = source.form == "rows" and config["LONG"]
        fn = getattr(functions(source.name, source.text), source.name + ("_long" if long else ""))
        return Plan(outs, (Launch(fn, self._grid(config), (*self._addresses(tensors), *outs, *source.numbers), {"BIG": source.big}, config),))

    def _addresses(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        for index, offset in self.source.reads:
            x = tensors[index]
            yield x.as_strided((1,), (1,), x.storage_offset() + offset) if offset else x

    def _grid(self, config: Config) -> tuple[int]:
        source = self.source
        match source.form:
            case "flat":
                return (cdiv(source.columns, config["BLOCK"]),)
            case "tiles":
                return (cdiv(source.rows, config["ROWS"]) * cdiv(source.columns, config["BLOCK"]),)
        return (cdiv(source.rows, config["ROWS"]),)

    def supports(self, *tensors: Tensor) -> str | None:
        """None: what it can't do was refused when it was made."""
        return None

    def estimate(self, config: Config, *tensors: Tensor) -> Estimate:
        """Elements of padded tiles count; a long row is read once per level, from the L2 cache after the first time."""
        source = self.source
        (programs,) = self._grid(config)
        block = config["BLOCK"]
        long = source.form == "rows" and config["LONG"]
        turns = source.levels * cdiv(source.columns, block) if long else 1
        tile = block * (1 if source.form == "flat" else config["ROWS"])
        padded = programs * tile * (turns // source.levels if long else 1)
        share = padded / max(source.rows * source.columns, 1)
        return Estimate(int(padded * source.work * (source.levels if long else 1)), "f32", source.moved,
                        int(source.moved * (source.levels if long else 1) * max(share, 1.0)), programs, 0, turns)  # fmt: skip

    def bucket(self, *tensors: Tensor) -> tuple[Any, ...]:
        """Dtypes and the kernel are in the name; rows are rounded."""
        columns = bucket(self.source.columns) if self.source.form == "flat" else self.source.columns
        return bucket(self.source.rows), columns, self.source.big

    def cost(self, *tensors: Tensor) -> Cost:
        return Cost(self.source.moved, int(self.source.work * self.source.rows * self.source.columns))

    def refuses(self, *tensors: Tensor) -> str | None:
        """None, or that a tensor lies where the kernel can't reach it."""
        return unfit_device(tensors)


def _no_samples() -> Iterator[Sample | Any]:
    """Regions come from programs; those that stand for them all are in ``graphwright.testing.generated``."""
    return iter(())
