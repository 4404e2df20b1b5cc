"""From an LLVM module to code that can be called."""

from __future__ import annotations

import functools
from typing import Any


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


def compiled(module: Any) -> bytes:
    """The module's machine code for this processor, as an object file."""
    from llvmlite import binding

    machine = _machine()
    parsed = binding.parse_assembly(str(module))
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
