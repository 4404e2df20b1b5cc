"""Half precision on a processor that multiplies none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from graphwright.accelerator import device_of
from graphwright.ir import Program, args_by_name, op_name, site_of
from graphwright.manager import Pass, PassResult
from graphwright.measure import has_fast_bf16, has_fast_fp16
from graphwright.ops import RANDOM, row
from graphwright.passes._nodes import is_op, same_layout, same_shape

aten = torch.ops.aten
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as")
_WORDS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Widen(Pass):
    """Compute in float32 what is given in half precision, where the processor multiplies no halves.

    There PyTorch's products of float16 take loops of scalars and those of bfloat16 many conversions, and no kernel of ours or
    oneDNN's is made for them. Inputs are widened where they come in, results rounded to their dtype once, at the end: nearer to
    what the model means than rounding after each op. Weights take twice the memory unless they are quantized later; tables of
    look-ups stay as they are. It wants to stand early, before anything looks for ops that kernels serve. Programs on a GPU, and
    those that write into tensors of half precision (caches), are left alone.
    """

    name = "widen"

    def run(self, program: Program) -> PassResult:
        result = PassResult()
        slow = frozenset(d for d, fast in ((torch.float16, has_fast_fp16), (torch.bfloat16, has_fast_bf16)) if not fast())
        made = [n for n in program.nodes if _in(n.meta.get("val"), slow) and not is_op(n, *_CASTS, "aten.embedding")]
        if not made or device_of(program).type != "cpu":
            return result
        reason = _reason(program, slow)
        if reason:
            result.refuse(site_of(made[0]), reason)
            return result
        left = [n for n in made if self.refused(result, n)]
        if left:
            result.notes.append(f"{len(left)} ops are left out, and one program has one precision here: all stay as they are")
            return result
        results = [(k, n.meta["val"].dtype) for k, n in enumerate(program.output.args[0]) if isinstance(n, fx.Node) and _in(n.meta.get("val"), slow)]  # type: ignore[arg-type, union-attr]
        words = " and ".join(sorted(_WORDS[d] for d in slow if any(_in(n.meta["val"], frozenset({d})) for n in made)))
        count = _widen(program, slow)
        outputs = list(program.output.args[0])  # type: ignore[arg-type]
        with program.graph.inserting_before(program.output):
            for k, dtype in results:
                node: Any = outputs[k]
                if node.meta["val"].dtype != dtype:
                    outputs[k] = program.call(aten.to.dtype, node, dtype, like=node)
        program.output.args = (type(program.output.args[0])(outputs),)  # type: ignore[arg-type, call-arg]
        program.tidy()
        result.change(site_of(made[0]), f"{count} ops in float32 instead of {words}, which this processor does not multiply")
        return result


def _dtypes(value: Any) -> set[torch.dtype]:
    several = value if isinstance(value, (tuple, list)) else [value]
    return {v.dtype for v in several if isinstance(v, Tensor)}


def _in(value: Any, dtypes: frozenset[torch.dtype]) -> bool:
    return bool(_dtypes(value) & dtypes)


def _reason(program: Program, slow: frozenset[torch.dtype]) -> str | None:
    """None, or why the program can't be computed in float32 as a whole."""
    for mutation in program.signature.mutations:
        target = program.placeholders[mutation.input].meta["val"] if mutation.buffer is None else program.tensor(mutation.buffer)
        if target.dtype in slow:
            return f"it writes into a tensor of {_WORDS[target.dtype]}"
    for node in program.nodes:
        found = row(node.target)  # type: ignore[arg-type]
        if not any(_in(n.meta.get("val"), slow) for n in (node, *node.all_input_nodes)) or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in (aten.view.dtype, aten.view_as_complex.default, aten.view_as_real.default):
            return f"{site_of(node)} reads memory as another type"
        if found is None:
            return f"{op_name(node.target)} has no row in the op table: what it does with float32 is not known"
        if RANDOM in found.traits and args_by_name(node).get("train", True):
            return f"{site_of(node)} draws numbers at random: others in float32"
    return None


def _widen(program: Program, slow: frozenset[torch.dtype]) -> int:
    """Every tensor of those dtypes as float32, look-ups in tables excepted; how many ops compute in it."""
    wide: dict[fx.Node, fx.Node] = {}
    count = 0
    first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))

    def of(node: fx.Node) -> fx.Node:
        """What stands for an input or constant of half precision."""
        if node.op not in ("placeholder", "get_attr") or not _in(node.meta["val"], slow):
            return node
        if node not in wide:
            if (stored := program.constant(node)) is not None:
                name = str(node.target)
                wide[node] = program.add_tensor(f"{name}_wide", stored.detach().float(), origin=[name], trainable=isinstance(stored, nn.Parameter))
            else:
                with program.graph.inserting_before(first):
                    wide[node] = program.call(aten.to.dtype, node, torch.float32, sites=[node.name])
        return wide[node]

    for node in program.nodes:
        if is_op(node, "aten.embedding") and program.constant(args_by_name(node)["weight"]) is not None and _in(node.meta["val"], slow):
            with program.graph.inserting_after(node):
                after = program.call(aten.to.dtype, node, torch.float32, like=node)
            node.replace_all_uses_with(after, delete_user_cb=lambda user, after=after: user is not after)
            wide[node] = after
            continue
        touched = _in(node.meta.get("val"), slow) or any(_in(n.meta.get("val"), slow) for n in node.all_input_nodes)
        node.args, node.kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), of)
        node.args, node.kwargs = tree_map(lambda v: torch.float32 if isinstance(v, torch.dtype) and v in slow else v, (node.args, dict(node.kwargs)))
        node.meta["val"] = program.infer(node)
        node.meta.pop("checked", None)
        source = node.args[0] if node.args else None
        if is_op(node, *_CASTS) and isinstance(source, fx.Node) and _same(node, source):
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
        elif touched:
            count += 1
    with program.graph.inserting_before(program.output):
        program.output.args = fx.node.map_arg(program.output.args, of)
    return count


def _same(node: fx.Node, source: fx.Node) -> bool:
    a, b = node.meta["val"], source.meta["val"]
    return a.dtype == b.dtype and a.device == b.device and same_shape(source, node) and same_layout(source, node)
