"""The cache on disk: private folders below the XDG cache folder, and a small store of JSON values for timings.

    timings = JsonCache("timings")
    timings.get(key)                # None where it is not known
    timings.put(key, [0.13, 0.14])
    timings.flush()

What lies here can always be made anew: a broken file is dropped, an unusable folder is replaced by one that lasts as
long as the process, and neither ever fails a call.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from graphwright.errors import InternalError

_VERSION = 1
_MAX_BYTES = 64 * 2**20
_MAX_ENTRIES = 20_000
_PATIENCE_S = 1.0


def folder(name: str) -> Path:
    """The folder ``name`` of the cache: it exists, belongs to this user, and nobody else can read it.

    Where that can't be had (a read-only home, somebody else's folder), a temporary one takes its place, with a warning.

    Raises:
        InternalError: ``name`` is no plain word.
    """
    try:
        return private(name)
    except (OSError, RuntimeError) as error:
        return _temporary(name, str(error))


def private(name: str) -> Path:
    """As ``folder``, for what is not worth a word where it can't be kept.

    Raises:
        OSError, RuntimeError: there can be no such folder.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise InternalError(f"{name!r} is no name for a cache folder")
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = stated if stated.is_absolute() else Path.home() / ".cache"
    base.mkdir(parents=True, exist_ok=True)
    for path in (base / "graphwright", base / "graphwright" / name):
        _make_private(path)
    return path


def _make_private(path: Path) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.stat()
    if info.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if stat.S_IMODE(info.st_mode) != 0o700:
        path.chmod(0o700)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path} cannot be written")


@functools.cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="graphwright-")


@functools.cache
def _temporary(name: str, reason: str) -> Path:
    warnings.warn(f"the cache folder cannot be used ({reason}): timings are kept for this process only", stacklevel=3)
    path = Path(_process_folder().name) / name
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by a file with these bytes, readable by this user alone; others see the old one or the new.

    Raises:
        OSError: the disk refuses; the old file is as it was.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


class JsonCache:
    """Values by key, in a file per shard; safe for several threads and processes at the same time.

    Values are JSON data. What another process has flushed is seen when a shard is first read and after ``flush``.

    Args:
        name: folder of the cache.
        shards: number of files, 1 to 256; a flush rewrites only those that changed.
    """

    def __init__(self, name: str, shards: int = 16):
        self.name, self.shards = name, shards
        self._held: dict[int, dict[str, Any]] = {}
        self._new: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        with self._lock:
            return self._shard(self._number(key)).get(key, default)

    def put(self, key: str, value: Any) -> None:
        """Remember a value; ``flush`` writes it.

        Raises:
            InternalError: it is no JSON data.
        """
        try:
            value = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InternalError(f"cache {self.name}: the value of {key!r} is no JSON data ({error})") from error
        with self._lock:
            number = self._number(key)
            self._shard(number)[key] = value
            self._new.setdefault(number, {})[key] = value

    def flush(self) -> None:
        """Write what is new, merged with what others wrote since. A full disk costs the cache, not the caller."""
        with self._lock:
            for number, new in self._new.items():
                path = self._path(number)
                with _brief_lock(path.with_suffix(".lock")):
                    merged = {k: v for k, v in _read(path).items() if k not in new} | new
                    merged = dict(list(merged.items())[-_MAX_ENTRIES:])
                    with suppress(OSError):
                        write_atomic(path, json.dumps({"version": _VERSION, "entries": merged}).encode())
                self._held[number] = merged
            self._new.clear()

    def _number(self, key: str) -> int:
        return hashlib.sha256(key.encode()).digest()[0] % self.shards

    def _path(self, number: int) -> Path:
        return folder(self.name) / f"{number:02x}-of-{self.shards}.json"

    def _shard(self, number: int) -> dict[str, Any]:
        if number not in self._held:
            self._held[number] = _read(self._path(number))
        return self._held[number]


def _read(path: Path) -> dict[str, Any]:
    """Entries of one file; a file that is broken, foreign or of another version is dropped."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        data = json.loads(path.read_bytes())
        if data["version"] != _VERSION or not isinstance(data["entries"], dict):
            raise ValueError("another version")
        return data["entries"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        with suppress(OSError):
            path.unlink()
        return {}


@contextmanager
def _brief_lock(path: Path) -> Iterator[None]:
    """Hold a lock for the moment of a merge; where it can't be had soon, go on without: at worst an entry is lost."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + _PATIENCE_S
        while not _locked(handle) and time.monotonic() < end:
            time.sleep(0.01)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
