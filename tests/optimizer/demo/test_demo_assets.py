"""Fetching by package name: a local wheel folder stands in for PyPI, a script on the PATH for npm."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graphwright.demo.assets import Asset, AssetError, Member, command, fetch

CONTENT = {"fakepkg/data/weights.bin": bytes(range(256)) * 40, "fakepkg/data/labels.txt": b"1\n2\n"}
UNWANTED = {"fakepkg/__init__.py": b"raise SystemExit('must not run')"}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _asset(client: str = "pip", **changed: str) -> Asset:
    members = tuple(Member(path, changed.get(path, _digest(data))) for path, data in CONTENT.items())
    return Asset(client, "fakepkg", "1.0", "MIT", 1, members)


def _write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    wheel = folder / "fakepkg-1.0-py3-none-any.whl"
    info = "fakepkg-1.0.dist-info"
    meta = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: fakepkg\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    names = [*files, *meta, f"{info}/RECORD"]
    with zipfile.ZipFile(wheel, "w") as out:
        for name, data in (files | meta).items():
            out.writestr(name, data)
        out.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in names))
    return wheel


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The assets folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphwright" / "assets"


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is all of PyPI."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def npm(tmp_path, monkeypatch) -> Path:
    """An `npm` that packs whatever tarball lies beside it; returns that tarball's path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tarball = folder / "stock.tgz"
    script = folder / "npm"
    script.write_text(
        f"#!{sys.executable} -IS\n"
        "import pathlib, shutil, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "if not (here / 'stock.tgz').exists(): sys.exit('npm error code ENOTFOUND')\n"
        "assert sys.argv[1] == 'pack' and sys.argv[-1] == 'fakepkg@1.0', sys.argv\n"
        "(to,) = [a.split('=', 1)[1] for a in sys.argv if a.startswith('--pack-destination=')]\n"
        "shutil.copy(here / 'stock.tgz', pathlib.Path(to) / 'fakepkg-1.0.tgz')\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return tarball


def _write_tarball(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def _left_over(home: Path) -> list[str]:
    return sorted(p.name for p in home.iterdir())


def test_keeps_the_members_alone_and_needs_the_client_once(home, index):
    wheel = _write_wheel(index, CONTENT | UNWANTED)
    lines: list[str] = []
    files = fetch(_asset(), lines.append)
    assert {name: path.read_bytes() for name, path in files.items()} == {
        "weights.bin": CONTENT["fakepkg/data/weights.bin"],
        "labels.txt": CONTENT["fakepkg/data/labels.txt"],
    }
    assert sorted(p.name for p in files["labels.txt"].parent.iterdir()) == ["labels.txt", "weights.bin"]
    assert _left_over(home) == ["fakepkg-1.0"]
    assert "PyPI fakepkg 1.0 (MIT)" in lines[0]
    wheel.unlink()
    again: list[str] = []
    assert fetch(_asset(), again.append) == files and not again


def test_cache_folder_is_private(home, npm):
    _write_tarball(npm, CONTENT)
    fetch(_asset("npm"))
    assert home.stat().st_mode & 0o777 == 0o700 and home.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["alter", "remove"])
def test_a_damaged_copy_is_fetched_anew(home, npm, damage):
    _write_tarball(npm, CONTENT)
    path = fetch(_asset("npm"))["labels.txt"]
    path.write_bytes(b"altered") if damage == "alter" else path.unlink()
    assert fetch(_asset("npm"))["labels.txt"].read_bytes() == CONTENT["fakepkg/data/labels.txt"]
    assert _left_over(home) == ["fakepkg-1.0"]


def test_an_altered_package_is_refused_and_leaves_nothing(home, index):
    _write_wheel(index, CONTENT | {"fakepkg/data/labels.txt": b"3\n4\n"})
    with pytest.raises(AssetError, match=r"labels\.txt of PyPI fakepkg 1\.0 .* altered"):
        fetch(_asset())
    assert _left_over(home) == []


def test_a_damaged_copy_survives_a_failed_download(home, npm):
    _write_tarball(npm, CONTENT)
    files = fetch(_asset("npm"))
    files["labels.txt"].write_bytes(b"altered")
    npm.unlink()
    with pytest.raises(AssetError):
        fetch(_asset("npm"))
    assert files["weights.bin"].read_bytes() == CONTENT["fakepkg/data/weights.bin"]


def test_an_absent_member_is_named(home, npm):
    _write_tarball(npm, {"fakepkg/data/weights.bin": CONTENT["fakepkg/data/weights.bin"]})
    with pytest.raises(AssetError, match=r"holds no readable fakepkg/data/labels\.txt"):
        fetch(_asset("npm"))
    assert _left_over(home) == []


def test_a_broken_archive_is_an_asset_error(home, npm):
    npm.write_bytes(b"not a tarball")
    with pytest.raises(AssetError, match="holds no readable"):
        fetch(_asset("npm"))
    assert _left_over(home) == []


def test_a_package_that_pip_cannot_find_shows_pips_own_words(home, index):
    with pytest.raises(AssetError, match=r"(?s)not downloaded.*status 1.*fakepkg==1\.0.*Check the network"):
        fetch(_asset())
    assert _left_over(home) == []


def test_npm_tarball(home, npm):
    _write_tarball(npm, CONTENT | UNWANTED)
    files = fetch(_asset("npm"))
    assert files["weights.bin"].read_bytes() == CONTENT["fakepkg/data/weights.bin"]
    assert _left_over(home) == ["fakepkg-1.0"]


def test_npm_that_fails_shows_its_words(home, npm):
    with pytest.raises(AssetError, match="ENOTFOUND"):
        fetch(_asset("npm"))


def test_missing_npm_says_what_to_install(home, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match=r"npm is missing.*\n.*Install Node\.js"):
        fetch(_asset("npm"))


def test_missing_pip_says_what_to_install(home, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"pip is missing(?s:.*)ensurepip"):
        fetch(_asset())


def test_fetching_at_the_same_time(home, npm):
    _write_tarball(npm, CONTENT)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: fetch(_asset("npm")), range(6)))
    assert all(f == found[0] for f in found)
    assert found[0]["labels.txt"].read_bytes() == CONTENT["fakepkg/data/labels.txt"]
    assert _left_over(home) == ["fakepkg-1.0"]


@pytest.mark.parametrize("client", ["pip", "npm"])
def test_commands_name_packages_and_no_host(client, tmp_path):
    line = " ".join(command(_asset(client), tmp_path / "into"))
    assert "fakepkg" in line and "://" not in line
