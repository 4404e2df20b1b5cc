"""From an LLVM module to code that can be called."""

from __future__ import annotations

import functools
from typing import Any

from graphwright.errors import InternalError


@functools.cache
def _host() -> tuple[str, str]:
    """The processor's name and features, as LLVM says them."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()


def _machine() -> Any:
    from llvmlite import binding

    cpu, features = _host()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="default", codemodel="jitdefault", jit=True)  # fmt: skip


def described() -> str:
    """What code is made for: the version of LLVM and the processor."""
    from llvmlite import binding

    return repr((binding.llvm_version_info, binding.get_default_triple(), *_host()))


#: What LLVM's names of instructions ask of a processor, the narrower ones first.
_NEEDED = {
    "llvm.x86.avx512.vpdpbusd.512": "avx512vnni", "llvm.x86.avx512.pshuf.b.512": "avx512bw",
    "llvm.x86.avx512.mask.reduce.ps.512": "avx512dq", "llvm.x86.avx512.": "avx512f",
}  # fmt: skip


def _lacking(text: str) -> str | None:
    """A feature that a module asks for and the processor has not, if there is one."""
    held = _host()[1].split(",")
    return next((feature for name, feature in _NEEDED.items() if name in text and f"+{feature}" not in held), None)


def compiled(module: Any) -> bytes:
    """The module's machine code for this processor, as an object file.

    Raises:
        InternalError: the processor lacks an instruction. (LLVM itself would end the process.)
    """
    from llvmlite import binding

    text = str(module)
    if (feature := _lacking(text)) is not None:
        raise InternalError(f"this kernel needs {feature}, which the processor {_host()[0]} has not", where=module.name)
    machine = _machine()
    parsed = binding.parse_assembly(text)
    parsed.triple, parsed.data_layout = machine.triple, str(machine.target_data)
    parsed.verify()
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_interleaving = tuning.loop_unrolling = True
    builder = binding.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(parsed, builder)
    return machine.emit_object(parsed)


def linked(code: bytes, name: str) -> tuple[Any, int]:
    """What owns the code of an object file from now on, and the address of the function ``name``; 0 where there is none."""
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, engine.get_function_address(name)
