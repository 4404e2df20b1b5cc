"""Ahead-of-time compilation without a GPU: does every config build, without spills, within shared memory, on the matrix units?

    python -m graphwright.kernels.gpu.ahead [kernels ...] [--target sm_90]     compile, and print a table
    python -m graphwright.kernels.gpu.ahead --check [--sample N]               what changed since it was recorded, and N others, against the record
    python -m graphwright.kernels.gpu.ahead --update                           record anew what changed

The record, a file per kernel in ``resources/``, is shipped: configs that it holds something against are never tried.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import inspect
import json
import random
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphwright.kernels import gpu
from graphwright.kernels.gpu.launch import Config, Family, Launch

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}

#: Bytes of shared memory that one program may take.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}

#: Where the record lies.
TABLES = Path(__file__).parent / "resources"

_TYPES = {
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.float16: "fp16",
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
    torch.float8_e4m3fnuz: "fp8e4b8",
}  # fmt: skip
_MATRIX = re.compile(r"\b(IGMMA|HGMMA|QGMMA|IMMA|HMMA|QMMA)((?:\.\w+)*)")
_MFMA = re.compile(r"\b(v_mfma_\w+|v_smfmac_\w+)")


@dataclass(frozen=True)
class Build:
    """One launch of a family under one config and one target.

    Attributes:
        family, case, config, target: by name; ``case`` is a name that ``Family.ahead`` gives.
        part: which of the plan's launches.
    """

    family: str
    case: str
    config: str
    target: str
    part: int

    @property
    def key(self) -> str:
        return f"{self.family} | {self.case} | {self.config} | {self.part} | {self.target}"


@dataclass(frozen=True)
class Built:
    """What the compiler made of a build.

    Attributes:
        source: digest of the function's source, what it calls, its constants, signature and config.
        registers: per thread. On AMD those of the vector unit.
        spills: bytes of local memory per thread (NVIDIA), registers spilled (AMD); 0 is wanted.
        shared: bytes per program.
        instructions: in the machine code.
        matrix: matrix instructions by name, with how often they stand in the code.
        problem: empty, or why the build is no good.
    """

    source: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: int = 0
    matrix: tuple[tuple[str, int], ...] = ()
    problem: str = ""


def builds(names: Sequence[str] = (), targets: Sequence[str] = ()) -> Iterator[Build]:
    """Every build of the families named (all, without names)."""
    for family in gpu.families().values():
        if names and family.name not in names:
            continue
        for case, args in family.ahead():
            for config in family.configs:
                if family.fits(config, *args) is None:
                    parts = range(len(family.plan(*args, config=config).launches))
                    yield from (Build(family.name, case, str(config), t, k) for t in family.targets if not targets or t in targets for k in parts)


def _resolve(build: Build) -> tuple[Family, Config, tuple[Any, ...], Launch]:
    family = gpu.families()[build.family]
    args = next(a for name, a in family.ahead() if name == build.case)
    config = next(c for c in family.configs if str(c) == build.config)
    return family, config, args, family.plan(*args, config=config).launches[build.part]


def source_of(launch: Launch, target: str) -> ASTSource:
    """What the compiler is given: signature and alignment as the launcher would find them. Addresses are taken to be multiples of 16."""
    constants = launch.constexprs(target.startswith("sm_"))
    names = launch.fn.arg_names
    free = [n for n in names if n not in constants]
    if len(free) != len(launch.args):
        raise TypeError(f"{launch.fn.__name__} takes {free}, but the plan gives {len(launch.args)} arguments")
    signature: dict[str, str] = dict.fromkeys(constants, "constexpr")
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for name, value in zip(free, launch.args, strict=True):
        where = (names.index(name),)
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attrs[where] = [["tt.divisibility", 16]]
        elif value is None or isinstance(value, int) and value == 1:  # the launcher makes constants of these too
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[where] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    ordered = {n: signature[n] for n in names}
    return ASTSource(fn=launch.fn, signature=ordered, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=attrs)


def options_of(launch: Launch) -> dict[str, int]:
    """The compiler's options for a launch; the digest covers these and the compiler gets no others."""
    return {"num_warps": launch.config.warps, "num_stages": launch.config.stages}


def written(fn: Any) -> list[str]:
    """The text of a function and of all that it calls, and the constants that it names: what Triton's own key holds beside line numbers, which
    change with a comment above, and the order in which a process met the functions."""
    found: dict[str, str] = {}
    left = [fn]
    while left:
        one = left.pop()
        name = f"{one.fn.__module__}.{one.fn.__qualname__}"
        if name in found:
            continue
        found[name] = one.src
        known = inspect.getclosurevars(one.fn)
        named = {**known.globals, **known.nonlocals}
        for node in ast.walk(ast.parse(one.src)):
            value = named.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and isinstance(named.get(node.value.id), types.ModuleType):
                value = getattr(named[node.value.id], node.attr, None)
            if isinstance(value, triton.JITFunction):
                if not value.fn.__module__.startswith("triton."):  # the compiler's own
                    left.append(value)
            elif isinstance(value, (triton.language.constexpr, bool, int, float, str, tuple)):
                found[f"{name}: {ast.unparse(node)}"] = repr(value)
    return [f"{name} = {text}" for name, text in sorted(found.items())]


def digest(launch: Launch, target: str) -> str:
    """Of everything of ours that the machine code depends on; not of the compiler."""
    source = source_of(launch, target)
    text = json.dumps([written(launch.fn), source.signature, sorted(map(str, source.constants.items())), sorted(map(str, source.attrs.items())),
                       *options_of(launch).values()])  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile(build: Build) -> Built:
    """Compile one build and read the machine code; never raises."""
    family, config, args, launch = _resolve(build)
    found = compile_launch(launch, build.target)
    matrix = family.matrix(config, *args, build.target)
    if not found.problem and matrix and not any(matrix in name for name, _ in found.matrix) and build.part == _main_part(family, config, args):
        return replace(found, problem=f"no {matrix} in the machine code, but {', '.join(n for n, _ in found.matrix) or 'no matrix instruction'}")
    return found


def compile_launch(launch: Launch, target: str) -> Built:
    """Compile what a launch would run on a target, and read the machine code; never raises."""
    mark = digest(launch, target)
    try:
        made = triton.compile(source_of(launch, target), target=TARGETS[target], options=options_of(launch))
        found = _read_amd(made, mark) if target.startswith("gfx") else _read_nvidia(made, mark)
    except Exception as error:  # the compiler's own: any kind  # noqa: BLE001
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Built(mark, problem=f"{type(error).__name__}: {' / '.join(lines[-2:])[:300]}")
    if found.spills:
        return replace(found, problem=f"{found.spills} spilled")
    if found.shared > SHARED[target]:
        return replace(found, problem=f"{found.shared} bytes of shared memory; {target} has {SHARED[target]}")
    return found


def _main_part(family: Family, config: Config, args: tuple[Any, ...]) -> int:
    """The launch of a plan that does the products: the one whose function says so by a ``dot``."""
    launches = family.plan(*args, config=config).launches
    return next((k for k, launch in enumerate(launches) if "tl.dot(" in launch.fn.src or "dot(" in launch.fn.src), 0)


@functools.cache
def _tools() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _read_nvidia(made: Any, mark: str) -> Built:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([_tools() / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))  # fmt: skip
    sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts = _counted(m[1] + m[2] for m in _MATRIX.finditer(code))
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
    return Built(mark, sizes["REG"], sizes["STACK"] + sizes["LOCAL"], made.metadata.shared, instructions, counts)


def _read_amd(made: Any, mark: str) -> Built:
    code = made.asm["amdgcn"]
    wanted = "vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size"
    sizes = {name: int(value) for name, value in re.findall(rf"\.({wanted}):\s+(\d+)", code)}
    # Scalar registers spill to lanes of vector registers; only what lies in private memory is slow.
    spills = sizes["vgpr_spill_count"] + sizes["sgpr_spill_count"] if sizes["private_segment_fixed_size"] else 0
    instructions = len(re.findall(r"^\t[a-z]\w+_\w+", code, re.MULTILINE))
    return Built(mark, sizes["vgpr_count"], spills, made.metadata.shared, instructions,
                 _counted(_MFMA.findall(code)))  # fmt: skip


def _counted(names: Any) -> tuple[tuple[str, int], ...]:
    every = list(names)
    return tuple(sorted((n, every.count(n)) for n in set(every)))


def compile_all(work: Sequence[Build], processes: int = 2) -> dict[str, Built]:
    """Compile several builds beside each other, by key."""
    if len(work) < 4 or processes < 2:
        return {b.key: compile(b) for b in work}
    with ProcessPoolExecutor(processes) as pool:
        return dict(zip((b.key for b in work), pool.map(compile, work, chunksize=2), strict=True))


def stale(work: Sequence[Build], table: dict[str, Any]) -> list[Build]:
    """The builds whose source is not the one that the table describes."""
    return [b for b in work if table.get(b.key, {}).get("source") != digest(_resolve(b)[3], b.target)]


def line(key: str, b: Built) -> str:
    """One row of the printed table."""
    matrix = " ".join(f"{n}x{c}" for n, c in b.matrix)
    return f"{key:<100} regs {b.registers:>3} spills {b.spills:>3} shared {b.shared:>6} code {b.instructions:>5} {matrix}" + (f"  BAD: {b.problem}" if b.problem else "")


def pruned(family: str, config: Config, target: str) -> str | None:
    """None, or why a config is never tried on a target: what the shipped tables hold against it, those of this version of Triton too."""
    from graphwright.kernels.gpu import versions

    where = (str(config), target)
    return problems(family).get(where) or versions.problems(family).get(where)


@functools.cache
def problems(family: str) -> dict[tuple[str, str], str]:
    """By config and target: what the record holds against a kernel's configs."""
    rows = read(family)
    return {(config, target): row["problem"] for key, row in rows.items() if row["problem"] for _, config, _, target in [_parts(key)]}


def _parts(key: str) -> tuple[str, str, str, str]:
    _, case, config, part, target = key.split(" | ")
    return case, config, part, target


def read(family: str) -> dict[str, Any]:
    """What is on record of a family's builds, by key; empty where nothing is."""
    return _record(family).get("builds", {})


def _record(family: str) -> dict[str, Any]:
    path = TABLES / f"{family}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(family: str, table: dict[str, Any], folder: Path | None = None) -> None:
    """Write a family's table, one build a line."""
    (folder or TABLES).mkdir(exist_ok=True)
    rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table.items()))
    ((folder or TABLES) / f"{family}.json").write_text(f'{{"triton": {json.dumps(triton.__version__)}, "builds": {{\n{rows}\n}}}}\n')


def _recorded_here(key: str) -> bool:
    return _record(key.partition(" | ")[0]).get("triton") == triton.__version__


def differs(built: Built, known: dict[str, Any], same_compiler: bool = True) -> str | None:
    """None, or what is worse than on record: another verdict, spills, a tenth more registers or shared memory, other matrix instructions.

    The same compiler makes the same of the same source: there, whatever differs shows that the row was not made by this code. Another
    version of Triton than that of the record is held to what must hold everywhere alone: no spills, the matrix instruction.
    """
    if not same_compiler:
        return built.problem if built.problem and not known["problem"] else None
    if built.source == known["source"] and (found := {**asdict(built), "matrix": dict(built.matrix)}) != known:
        return f"a stale row: {({k: v for k, v in found.items() if v != known.get(k)})}; on record: {({k: v for k, v in known.items() if v != found.get(k)})}"
    if bool(built.problem) != bool(known["problem"]):
        return f"{built.problem or 'good'}; on record: {known['problem'] or 'good'}"
    for name in ("registers", "shared"):
        now, then = getattr(built, name), known[name]
        if not built.problem and now > 1.1 * then + 8:
            return f"{now} {name}; on record: {then}"
    return None if {n for n, _ in built.matrix} == set(known["matrix"]) else f"{dict(built.matrix)}; on record: {known['matrix']}"


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring; 1 where something differs from the record, or no config of a case is good for a target."""
    parser = argparse.ArgumentParser(prog="graphwright.kernels.gpu.ahead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", nargs="*", help="only these kernels")
    parser.add_argument("--target", action="append", default=[], choices=TARGETS)
    parser.add_argument("--check", action="store_true", help="compile what changed since the record was written, and fail if it did")
    parser.add_argument("--update", action="store_true", help="compile what changed since the record was written, and write it anew")
    parser.add_argument("--sample", type=int, default=0, help="with --check: compile so many others too")
    parser.add_argument("--all", action="store_true", help="compile everything")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    if gpu.interpreting():
        parser.error("TRITON_INTERPRET is set: nothing can be compiled")
    names = options.kernels or sorted(gpu.families())
    if unknown := sorted(set(names) - set(gpu.families())):
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(sorted(gpu.families()))}")
    if len(names) > 1:  # Triton's digest of a function depends on what was digested before it in the same process
        flags = [word for word in (sys.argv[1:] if argv is None else argv) if word not in options.kernels]
        return max(subprocess.run([sys.executable, "-m", __spec__.name, name, *flags], check=False).returncode for name in names)
    table = {key: row for name in names for key, row in read(name).items()}
    everything = list(builds(names, options.target))
    work = everything if options.all or not (options.check or options.update) else stale(everything, table)
    changed = {b.key for b in work} if options.check and not options.all else set()
    if options.check:
        rest = [b for b in everything if b.key not in {w.key for w in work}]
        work = [*work, *random.sample(rest, min(options.sample, len(rest)))]
    made = compile_all(work, options.processes)
    for key, built in made.items():
        print(line(key, built), flush=True)
    complaints = [f"changed since it was recorded: {key}" for key in sorted(changed)]
    if options.check:
        complaints += [f"{key}: {d}" for key, built in made.items() if key not in changed and (d := differs(built, table[key], _recorded_here(key)))]
    fresh = {**table, **{key: {**asdict(b), "matrix": dict(b.matrix)} for key, b in made.items()}}
    fresh = {b.key: fresh[b.key] for b in everything if b.key in fresh}
    if options.check and not options.target:
        complaints += [f"on record, but no build: {key}" for key in sorted(set(table) - set(fresh))]
    if options.update:
        for name in names:
            others = {k: v for k, v in read(name).items() if options.target and _parts(k)[3] not in options.target}
            write(name, {**others, **{k: v for k, v in fresh.items() if k.startswith(f"{name} | ")}})
    complaints += _without_any(fresh)
    print("\n".join(complaints))
    print(f"{len(everything)} builds, {len(made)} compiled, {sum(bool(b['problem']) for b in fresh.values())} pruned, {len(complaints)} complaints, triton {triton.__version__}")
    return int(bool(complaints))


def _without_any(table: dict[str, Any]) -> list[str]:
    """Cases for which no config is good, by target."""
    good: dict[tuple[str, str, str], bool] = {}
    for key, row in table.items():
        case, _, _, target = _parts(key)
        where = key.partition(" | ")[0], case, target
        good[where] = good.get(where, False) or not row["problem"]
    return [f"no config is good: {' | '.join(where)}" for where, any_ in good.items() if not any_]


if __name__ == "__main__":
    sys.exit(main())
