"""Permission, not a rewrite: whoever lowers the program may compute in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphwright.ir import Program
from graphwright.manager import Pass, PassResult


@dataclass(frozen=True)
class AllowBf16(Pass):
    """Let lowering compute in bfloat16 where that measures faster."""

    name = "allow-bf16"
    precisions: ClassVar[frozenset[str]] = frozenset({"bf16"})

    def run(self, program: Program) -> PassResult:
        return PassResult(notes=["bfloat16 is allowed where it measures faster"])
