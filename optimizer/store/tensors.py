"""Tensors on disk: each storage is written once, and every tensor is a described view into one.

A storage that one contiguous tensor fills keeps that tensor's name, dtype and shape in the file, so that other tools
can read it; any other (tied weights, slices, channels_last, dtypes that safetensors lacks) is a flat run of bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphwright.errors import LoadError, SaveError
from graphwright.store.reading import INT_MAX, Record, bad, want, want_int

#: By name, every dtype that a file may speak of.
DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in vars(torch).values()
    if isinstance(d, torch.dtype) and not str(d).startswith(("torch.q", "torch.bits"))
}

#: Dtypes that safetensors writes under their own name, and its name for them.
_NATIVE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NATIVE_NAMES = {v: k for k, v in _NATIVE.items()}
_ALIGN = 16


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def digest(tensor: Tensor) -> str:
    """sha256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(memoryview(as_bytes(tensor).numpy())).hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as a flat uint8 tensor that shares it."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


# -- writing ---------------------------------------------------------------------------------------------------------


class StorageTable:
    """Collects the tensors of all variants, storage by storage."""

    def __init__(self) -> None:
        self._groups: dict[Any, list[tuple[str, Tensor]]] = {}
        self._plain: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the first of each pair keeps the id taken

    def add(self, name: str, tensor: Tensor, where: str) -> None:
        """Note that ``tensor`` is to be saved.

        Raises:
            SaveError: it holds no plain memory (sparse, quantized, meta, a subclass).
        """
        dense = self._dense(tensor, where)
        self._groups.setdefault(self._key(dense), []).append((name, dense))

    def _dense(self, tensor: Tensor, where: str) -> Tensor:
        if id(tensor) not in self._plain:
            self._plain[id(tensor)] = (tensor, plain(tensor, where))
        return self._plain[id(tensor)][1]

    @staticmethod
    def _key(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        return (str(tensor.device), storage.data_ptr() if tensor.numel() else None)

    def finish(self) -> tuple[dict[str, Tensor], dict[Any, tuple[str, int]]]:
        """What to write.

        Returns:
            The runs of memory by their name in the file, and for each group ``(name, first byte of the run)``.
        """
        runs: dict[str, Tensor] = {}
        places: dict[Any, tuple[str, int]] = {}
        for key, members in self._groups.items():
            if key[1] is None:  # empty tensors have no memory
                continue
            name = free_name(members[0][0], runs)
            first, last = _extent(t for _, t in members)
            tensor = members[0][1]
            whole = all(t.is_contiguous() and t.dtype == tensor.dtype and t.shape == tensor.shape for _, t in members)
            if whole and tensor.dtype in _NATIVE and (first, last) == _extent([tensor]):
                runs[name], first = tensor.detach(), tensor.storage_offset() * tensor.element_size()
            else:
                first -= first % _ALIGN
                memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                runs[name] = memory.set_(tensor.untyped_storage(), first, (last - first,), (1,))
            places[key] = (name, first)
        return {n: t.cpu() for n, t in runs.items()}, places

    def describe(self, tensor: Tensor, places: Mapping[Any, tuple[str, int]], where: str) -> dict[str, Any]:
        """JSON of one tensor: where its bytes lie and how they are to be read."""
        tensor = self._dense(tensor, where)
        key = self._key(tensor)
        run, first = places.get(key, (None, 0))
        offset = tensor.storage_offset() * tensor.element_size() - first if run is not None else 0
        return {
            "run": run,
            "offset": offset,
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "device": str(tensor.device),
        }


def plain(tensor: Tensor, where: str) -> Tensor:
    """``tensor`` without autograd and without lazy conjugation.

    Raises:
        SaveError: its memory cannot be described by shape and strides.
    """
    kind = type(tensor)
    if kind not in (Tensor, torch.nn.Parameter):
        raise SaveError(f"{where} is a {kind.__name__}, not a plain tensor", hint="Convert it to a plain tensor first.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        what = (
            "quantized"
            if tensor.is_quantized
            else "without data"
            if tensor.device.type == "meta"
            else str(tensor.layout)
        )
        raise SaveError(
            f"{where} is a tensor that cannot be saved ({what})", hint="Convert it to a dense tensor first."
        )
    return tensor.detach().resolve_conj().resolve_neg()


def _extent(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """First byte and the byte past the last that the tensors read of their storage."""
    spans = []
    for t in tensors:
        reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        spans.append((t.storage_offset() * t.element_size(), (t.storage_offset() + reach + 1) * t.element_size()))
    return min(a for a, _ in spans), max(b for _, b in spans)


def free_name(name: str, taken: Mapping[str, Any]) -> str:
    candidate, k = name, 1
    while candidate in taken or candidate == "__metadata__":
        k += 1
        candidate = f"{name}#{k}"
    return candidate


def _each(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """The function of every item, by four threads; by this one where the interpreter is about to end and starts no more."""
    items = list(items)
    try:
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(4)
        waiting = [pool.submit(function, item) for item in items]
    except RuntimeError:
        return [function(item) for item in items]
    with pool:
        return [w.result() for w in waiting]


def index(runs: Mapping[str, Tensor]) -> dict[str, Any]:
    """JSON of the runs: dtype, shape and checksum of each."""
    sums = _each(digest, runs.values())
    return {
        n: {"dtype": _NATIVE[t.dtype], "shape": list(t.shape), "sha256": s}
        for (n, t), s in zip(runs.items(), sums, strict=True)
    }


# -- reading ---------------------------------------------------------------------------------------------------------


def check_index(value: Any, held: Mapping[str, tuple[str, list[int]]]) -> dict[str, str]:
    """Compare the runs that the graph speaks of with those that the file's header lists; no data is read.

    Args:
        value: the JSON of ``index``.
        held: dtype and shape by name, from the header.

    Returns:
        The checksum of each run.

    Raises:
        LoadError: the two differ.
    """
    table = want(value, dict, "runs")
    if set(table) != set(held):
        odd = min(set(table) ^ set(held))
        bad(f"tensor data {odd[:80]!r}", "in the graph or in the file's header, but not in both")
    sums = {}
    for name, entry in table.items():
        record = Record(entry, "dtype shape sha256", f"tensor data {name[:80]!r}")
        if (record.raw("dtype"), record.raw("shape")) != held[name]:
            bad(
                record.where,
                f"{record.raw('dtype')}{record.raw('shape')} in the graph, {held[name]} in the file's header",
            )
        if record.raw("dtype") not in _NATIVE_NAMES:
            bad(record.where, f"unknown dtype {record.raw('dtype')!r}")
        sums[name] = record.get("sha256", str)
    return sums


def read_runs(file: Any, sums: Mapping[str, str]) -> dict[str, Tensor]:
    """The runs, copied out of the file and checked as copied, several at a time.

    Raises:
        LoadError: a checksum does not fit.
    """

    def one(name: str) -> Tensor:
        tensor = file.get_tensor(name).clone()
        if digest(tensor) != sums[name]:
            raise LoadError(
                f"the data of tensor {name!r} were altered: its checksum does not fit",
                hint="Copy the file again from where it came, or save the model anew.",
            )
        return tensor

    return dict(zip(sums, _each(one, sums), strict=True))


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie and how they are read; checked against its run before anything is made of it."""

    run: str | None
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str

    @classmethod
    def read(cls, value: Any, sizes: Mapping[str, int], where: str) -> Place:
        """Args: ``sizes``: bytes of every run.

        Raises:
            LoadError: wrong types, an unknown run, or bytes outside of it.
        """
        record = Record(value, "run offset dtype shape stride device", where)
        dtype = read_dtype(record.raw("dtype"), where)
        shape, stride = (read_sizes(record.raw(k), f"{where}.{k}") for k in ("shape", "stride"))
        offset = record.integer("offset", 0)
        if len(shape) != len(stride):
            bad(where, f"{len(shape)} sizes and {len(stride)} strides")
        place = cls(record.raw("run"), offset, dtype, shape, stride, record.get("device", str))
        if 0 in shape:
            if place.run is not None or offset:
                bad(where, "an empty tensor has no data")
            return place
        if type(place.run) is not str or place.run not in sizes:
            bad(where, f"its data {str(place.run)[:80]!r} are not in the file")
        reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
        if offset % dtype.itemsize or offset + reach * dtype.itemsize > sizes[place.run]:
            bad(where, f"it reads up to byte {offset + reach * dtype.itemsize} of {sizes[place.run]}")
        return place

    def tensor(self, runs: Mapping[str, Tensor]) -> Tensor:
        """The tensor, sharing its run's memory with others that are read from it."""
        if self.run is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        storage = runs[self.run].untyped_storage()
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset // self.dtype.itemsize, self.shape, self.stride)


def read_dtype(value: Any, where: str) -> torch.dtype:
    """A dtype by name, or LoadError."""
    found = DTYPES.get(value) if isinstance(value, str) else None
    if found is None:
        bad(where, f"unknown dtype {str(value)[:40]!r}")
    return found


def read_sizes(value: Any, where: str) -> tuple[int, ...]:
    """Sizes or strides: at most 64 integers, none negative, or LoadError."""
    items = want(value, list, where)
    if len(items) > 64:
        bad(where, f"{len(items)} axes")
    return tuple(want_int(v, where, 0, INT_MAX) for v in items)


def read_device(word: str, where: str) -> torch.device:
    """A device that this machine has, or LoadError."""
    try:
        device = torch.device(word)
    except RuntimeError:
        bad(where, f"unknown device {word[:40]!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LoadError(
            f"{where}: it was saved for {word}, and this machine has no CUDA device",
            hint="Optimize the model for the CPU and save that result.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LoadError(f"{where}: it was saved for {word}, and this machine has {torch.cuda.device_count()} CUDA devices",
                        hint="Let CUDA_VISIBLE_DEVICES show as many as the model was optimized with.")  # fmt: skip
    if device.type not in ("cpu", "cuda"):
        bad(where, f"device {word[:40]!r} is not supported")
    return device
