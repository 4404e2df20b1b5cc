"""The wheel: complete, and at peace with Hugging Face's package `kernels`, whose name our folder bears."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"optimizer": "graphwright", "passes": "graphwright/passes", "kernels": "graphwright/kernels"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that nothing is left in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return made


def test_every_source_file_is_in_the_wheel(wheel):
    """A new subfolder without `__init__.py`, or one that setup.py misses, fails here."""
    want = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")}
    assert want - packed == set()
    assert packed - want == set()


def test_the_wheel_has_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"graphwright", wheel.name.split("-py3")[0] + ".dist-info"}
    assert "graphwright/py.typed" in names


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = wheel.name.split("-py3")[0] + ".dist-info"
    text = archive.read(f"{info}/METADATA").decode()
    assert "\nName: graphwright\n" in text and "\nLicense-Expression: Apache-2.0\n" in text
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    entries = configparser.ConfigParser()
    entries.read_string(archive.read(f"{info}/entry_points.txt").decode())
    assert entries["console_scripts"]["graphwright"] == "graphwright.cli:main"


def test_entry_points_exist():
    """Whatever this environment has installed for us can be loaded."""
    for entry in metadata.distribution("graphwright").entry_points:
        assert callable(entry.load()), entry


def _site(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A clean environment that holds our wheel and a copy of HF `kernels`; the rest it sees in ours."""
    try:
        installed = metadata.distribution("kernels").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's kernels is not installed: pip install '.[test]'")
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    site = _site(home)
    for file in installed:
        if ".." not in file.parts and "__pycache__" not in file.parts:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)
    # A path line, not addsitedir: the .pth files there, our editable install among them, are not followed.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    pip = [sys.executable, "-m", "pip", f"--python={home / 'bin' / 'python'}", "install", "--quiet"]
    done = subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return home


def test_hugging_face_kernels_is_untouched(environment):
    for file in metadata.distribution("kernels").files or []:
        if file.suffix == ".py" and ".." not in file.parts:
            assert (_site(environment) / file).read_bytes() == Path(file.locate()).read_bytes(), file


def test_both_import_side_by_side(environment, tmp_path):
    code = """
import sys, kernels, graphwright, graphwright.kernels, graphwright.passes
for module in (kernels, graphwright, graphwright.kernels, graphwright.passes):
    assert module.__file__.startswith(sys.prefix), module.__file__
assert kernels is not graphwright.kernels
assert hasattr(kernels, "get_kernel") and not hasattr(graphwright.kernels, "get_kernel")
"""
    done = subprocess.run(
        [environment / "bin" / "python", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_transformers_imports_beside_our_folder():
    """`python -m pytest` from the root puts our folder `kernels` on the path under its bare name."""
    pytest.importorskip("transformers")
    code = "import kernels, transformers; from transformers import BertModel; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"


def test_the_command_runs(environment, tmp_path):
    done = subprocess.run(
        [environment / "bin" / "graphwright", "--help"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "optimize" in done.stdout and "Traceback" not in done.stderr


def test_importing_needs_torch_alone(tmp_path):
    """`import graphwright` leaves what only some calls need alone."""
    code = """
import sys
import torch
before = set(sys.modules)
import graphwright
heavy = {"rich", "typer", "scipy", "llvmlite", "triton", "transformers", "safetensors", "onnx", "openvino", "torchao"}
print(sorted(heavy & {m.split(".")[0] for m in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr


def test_every_installed_requirement_is_pinned():
    """constraints.txt names each package that `make demo` and `make test` bring in, whatever asked for it."""
    requirements = pytest.importorskip("packaging.requirements")
    pinned = {
        _canonical(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    queue, seen = [("graphwright", {"demo", "test"})], set()
    while queue:
        name, extras = queue.pop()
        if (name, frozenset(extras)) in seen:
            continue
        seen.add((name, frozenset(extras)))
        try:
            wanted = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        for line in wanted:
            requirement = requirements.Requirement(line)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *extras}):
                queue.append((_canonical(requirement.name), requirement.extras))
    names = {name for name, _ in seen if not name.startswith(("nvidia-", "cuda-", "triton"))} - {"graphwright"}
    assert len(names) > 30
    assert names - pinned == set()


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
