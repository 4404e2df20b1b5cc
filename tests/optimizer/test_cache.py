"""The cache on disk: private, shared between processes, and never in the way."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from graphwright import cache
from graphwright.cache import JsonCache
from graphwright.errors import InternalError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg"


def test_folders_are_private(home: Path) -> None:
    path = cache.folder("timings")
    assert path == home / "graphwright" / "timings"
    for p in (path, path.parent):
        assert stat.S_IMODE(p.stat().st_mode) == 0o700
    path.chmod(0o777)
    assert stat.S_IMODE(cache.folder("timings").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp", "A", "a.b"])
def test_names_are_plain_words(name: str) -> None:
    with pytest.raises(InternalError, match="no name"):
        cache.folder(name)


def test_another_users_folder_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.folder("timings")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    cache._temporary.cache_clear()
    with pytest.warns(UserWarning, match="belongs to another user"):
        path = cache.folder("timings")
    assert home not in path.parents and path.is_dir()


def test_an_impossible_folder_is_replaced(home: Path) -> None:
    home.write_text("a file stands here")
    cache._temporary.cache_clear()
    store = JsonCache("timings")
    with pytest.warns(UserWarning, match="this process only"):
        store.put("a", 1)
    store.flush()
    assert store.get("a") == 1


def test_a_relative_xdg_path_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder("x") == tmp_path / ".cache" / "graphwright" / "x"


def test_values_survive_the_process(home: Path) -> None:
    first = JsonCache("timings")
    assert first.get("k") is None and first.get("k", 3) == 3
    for k in range(100):
        first.put(f"key {k}", {"ms": [k / 7, None], "ü": "ß"})
    assert first.get("key 5") == {"ms": [5 / 7, None], "ü": "ß"}
    assert JsonCache("timings").get("key 5") is None
    first.flush()
    assert JsonCache("timings").get("key 99") == {"ms": [99 / 7, None], "ü": "ß"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in (home / "graphwright" / "timings").glob("*.json")} == {0o600}


def test_only_json_is_kept() -> None:
    for value in (object(), {1, 2}, float("nan")):
        with pytest.raises(InternalError, match="no JSON data"):
            JsonCache("timings").put("k", value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"version": 99, "entries": {}}', b'{"version": 1, "entries": []}', b"\xff\xfe", b"[" * 50_000],
)
def test_a_broken_file_is_dropped_and_rebuilt(content: bytes) -> None:
    path = cache.folder("timings") / "00-of-1.json"
    path.write_bytes(content)
    store = JsonCache("timings", shards=1)
    assert store.get("k") is None and not path.exists()
    store.put("k", 1)
    store.flush()
    assert JsonCache("timings", shards=1).get("k") == 1


def test_a_full_disk_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    store = JsonCache("timings", shards=1)
    store.put("k", 1)
    monkeypatch.setattr(os, "replace", full)
    store.flush()
    assert store.get("k") == 1
    assert not [p for p in cache.folder("timings").iterdir() if p.suffix != ".lock"]


def test_processes_and_threads_lose_nothing() -> None:
    code = (
        "import sys; from graphwright.cache import JsonCache; c = JsonCache('t', shards=1)\n"
        "for k in range(30): c.put(f'{sys.argv[1]} {k}', k); c.flush()"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(k)]) for k in range(2)]
    store = JsonCache("t", shards=1)

    def work(name: str) -> None:
        for k in range(30):
            store.put(f"{name} {k}", k)
            store.flush()

    threads = [threading.Thread(target=work, args=(n,)) for n in ("x", "y")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [p.wait() for p in others] == [0, 0]
    fresh = JsonCache("t", shards=1)
    assert all(fresh.get(f"{n} {k}") == k for n in ("0", "1", "x", "y") for k in range(30))


def test_the_oldest_entries_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MAX_ENTRIES", 5)
    store = JsonCache("t", shards=1)
    for k in range(9):
        store.put(str(k), k)
    store.flush()
    assert [store.get(str(k)) for k in (3, 4, 8)] == [None, 4, 8]
