"""The file round the graphs: what it holds, how it is written in one piece, and how it is checked before it is read."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphwright.errors import GraphwrightError, LoadError, SaveError
from graphwright.ir import Program
from graphwright.store import foreign, verified
from graphwright.store.graph import Draft, program_to_json, read_program
from graphwright.store.reading import Record, dumps, from_json, loads, to_json
from graphwright.store.tensors import Place, StorageTable, check_index, index, read_runs

#: Version of the format. A file of a newer version is refused, since it may hold what this one would overlook.
SCHEMA = 1
_KEY = "graphwright"
_MAX_HEADER = 64 * 2**20
_ADVICE = "Copy the file again from where it came, or save the model anew."


@dataclass
class Variant:
    """One captured program, as it was lowered.

    Attributes:
        plan: plain data: which kernel runs each node.
        example: ``(shape, dtype)`` of each flat input that it was captured with, as plain data.
    """

    program: Program
    plan: dict[str, Any] = field(default_factory=dict)
    example: list[Any] = field(default_factory=list)


@dataclass
class Archive:
    """All that a file holds.

    Attributes:
        variants: programs for the shapes that the model was captured for; tensors may be shared between them.
        meta: plain data about the whole: recipe, report, machine, versions, attributes of the original.
    """

    variants: list[Variant]
    meta: dict[str, Any] = field(default_factory=dict)


# -- writing ---------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike[str], archive: Archive) -> None:
    """Write ``archive`` to one file, in one piece: an older file stays as it is until the new one is complete.

    Raises:
        SaveError: something in it is no plain data, or the disk refuses (full, no such folder, no permission).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    table = StorageTable()
    for variant in archive.variants:
        for name, tensor in variant.program.tensors().items():
            table.add(name, tensor, f"tensor {name!r}")
    runs, places = table.finish()
    variants = [
        {
            "program": program_to_json(v.program, lambda n, t: table.describe(t, places, f"tensor {n!r}")),
            "plan": to_json(v.plan, "plan"),
            "example": to_json(v.example, "example"),
        }
        for v in archive.variants
    ]
    needs = foreign.needs(v.program for v in archive.variants)
    meta = {**archive.meta, "needs": needs} if needs else archive.meta
    body = dumps({"meta": to_json(meta, "meta"), "variants": variants, "runs": index(runs)})
    seal = f"{SCHEMA} {hashlib.sha256(body.encode()).hexdigest()} {body}"
    if 2 * len(seal) > _MAX_HEADER:
        raise SaveError(f"the description of the graph takes {len(body) / 2**20:.0f} MiB, more than a file may hold")
    target = Path(path)
    target = target.resolve() if target.is_symlink() else target
    try:
        with _replacing(target) as temporary:
            save_file(runs, temporary, {_KEY: seal})
            if not any(v.program.signature.symbols for v in archive.variants):
                _read_back(temporary)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"{target} cannot be written: {_reason(error)}",
            hint="Nothing was written; a file of that name is as it was. Free some space or choose another folder.",
        ) from error


def _read_back(path: str) -> None:
    """Check the graphs of a file just written, while all that takes is imported: loading it here is then quick.

    Raises:
        SaveError: it would not load.
    """
    try:
        with _opened(path) as file:
            _drafts(file, *_body(file, path))
    except LoadError as error:
        raise SaveError(f"what was written can't be loaded: {error.what}", hint="Please report this model.") from error


@contextmanager
def _replacing(target: Path) -> Iterator[str]:
    """A temporary file beside ``target`` that takes its place if all goes well, and vanishes otherwise."""
    if target.is_dir():
        raise IsADirectoryError(21, "it is a folder", str(target))
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:80]}.", suffix=".tmp", dir=target.parent or ".")
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, _mode(target))
        _sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some file systems cannot; the file itself is complete
        _sync(target.parent)


def _mode(target: Path) -> int:
    """The permissions of the file that is replaced, or those of a new file."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip()


# -- reading ---------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Archive:
    """Read a file that ``save`` wrote.

    The header, the graphs and all sizes are checked before tensor data are read, and those against their checksums.

    Raises:
        LoadError: no such file, foreign, truncated, altered, of a newer version, or with ops that are unknown here.
    """
    where = str(path)
    with _opened(where) as file:
        body, checksum = _body(file, where)
        meta = from_json(body.get("meta", dict), "meta")
        foreign.require(meta.get("needs"), where)
        _require_gpu(meta.get("gpu"), where)
        records, drafts, sums = _drafts(file, body, checksum)
        runs = read_runs(file, sums)
    placed: dict[tuple[str, str], Tensor] = {}

    def contents(place: Place) -> Tensor:
        if place.run is not None and (place.run, place.device) not in placed:
            placed[place.run, place.device] = runs[place.run].to(place.device)
        here = {} if place.run is None else {place.run: placed[place.run, place.device]}
        return place.tensor(here)

    variants = []
    for record, draft in zip(records, drafts, strict=True):
        with _as_load_error(record.where):
            program = draft.finish(contents)
        plan, example = (from_json(record.get(k, t), record.where) for k, t in (("plan", dict), ("example", list)))
        variants.append(Variant(program, plan, example))
    return Archive(variants, meta)


def _require_gpu(gpu: Any, where: str) -> None:
    """LoadError where a file was made for a GPU and there is none; nothing is read before."""
    if gpu is not None and not torch.cuda.is_available():
        name = str(gpu.get("gpu", "a GPU"))[:80] if isinstance(gpu, dict) else "a GPU"
        raise LoadError(
            f"{where} was optimized on {name}, and torch {torch.__version__} finds no CUDA device here",
            hint="Load it where there is such a GPU and a build of torch for it; for the CPU, optimize the model there and save that.",
        )


def peek(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``Archive.meta`` alone, without reading tensors or building graphs.

    Raises:
        LoadError: as ``load``, as far as the header tells.
    """
    with _opened(str(path)) as file:
        return from_json(_body(file, str(path))[0].get("meta", dict), "meta")


def _drafts(file: Any, body: Record, checksum: str) -> tuple[list[Record], list[Draft], dict[str, str]]:
    """Every variant's record and its program, all but its tensors; and the checksum of each run of tensor data."""
    sums = check_index(body.raw("runs"), _held(file))
    sizes = {n: _run_bytes(file, n) for n in sums}
    records = [Record(v, "program plan example", f"variant {k}") for k, v in enumerate(body.get("variants", list))]
    trusted = verified.known(checksum)
    drafts = []
    for record in records:
        with _as_load_error(record.where):
            drafts.append(read_program(record.raw("program"), sizes, record.where, trusted))
    if not trusted and all(d.settled for d in drafts):
        verified.note(checksum)
    return records, drafts, sums


@contextmanager
def _as_load_error(where: str) -> Iterator[None]:
    """What torch throws at a graph that does not fit together becomes a LoadError: the file is at fault."""
    try:
        yield
    except LoadError:
        raise
    except (Exception, RecursionError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise LoadError(f"{where}: the graph does not fit together ({line})", hint=_ADVICE) from error


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The safetensors file, once its first bytes have been looked at."""
    from safetensors import SafetensorError, safe_open

    _check_start(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} is truncated or altered: {_reason(error)}", hint=_ADVICE) from error
    except GraphwrightError:
        raise
    except MemoryError:
        raise LoadError(f"{path} does not fit into memory") from None


def _check_start(path: str) -> None:
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise LoadError(f"{path} is no file", hint="Pass the path of a file that save() wrote.")
        with open(path, "rb") as file:
            length, start = int.from_bytes(file.read(8), "little"), file.read(2)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {_reason(error)}") from error
    if info.st_size < 10 or start != b'{"':
        raise LoadError(f"{path} is not a Graphwright file", hint="Pass the path of a file that save() wrote.")
    if length > _MAX_HEADER or length + 8 > info.st_size:
        raise LoadError(
            f"{path} is truncated or altered: its header claims {length} bytes, the file has {info.st_size}",
            hint=_ADVICE,
        )


def _body(file: Any, path: str) -> tuple[Record, str]:
    """The JSON of the graphs, its version and checksum found right, and that checksum."""
    seal = (file.metadata() or {}).get(_KEY)
    if seal is None:
        raise LoadError(
            f"{path} is a safetensors file without a graph, not a Graphwright file",
            hint="Pass the path of a file that save() wrote.",
        )
    version, _, rest = seal.partition(" ")
    checksum, _, body = rest.partition(" ")
    if version != str(SCHEMA):
        raise LoadError(
            f"{path} has the format version {version[:20]!r}; this Graphwright reads version {SCHEMA}",
            hint="Load it with the version of Graphwright that wrote it, or upgrade.",
        )
    if hashlib.sha256(body.encode()).hexdigest() != checksum:
        raise LoadError(f"{path} was altered: the checksum of its graph does not fit", hint=_ADVICE)
    return Record(loads(body, "the graph"), "meta variants runs", "the graph"), checksum


def _held(file: Any) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every run, from the header alone."""
    return {n: (file.get_slice(n).get_dtype(), list(file.get_slice(n).get_shape())) for n in list(file.keys())}


def _run_bytes(file: Any, name: str) -> int:
    part = file.get_slice(name)
    return torch.Size(part.get_shape()).numel() * _ITEM[part.get_dtype()]


_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
