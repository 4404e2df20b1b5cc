"""The runnable form: a list of steps over registers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphwright import accelerator
from graphwright.backends.base import NATIVE, Candidate, Format, Read, Work
from graphwright.errors import InternalError
from graphwright.ir import Program
from graphwright.lower.arrange import arranged, freed, protected
from graphwright.lower.conversions import conversion, possible
from graphwright.lower.graph import Analysis, Region, schedule
from graphwright.lower.inplace import reuse
from graphwright.lower.liveness import run_poisoned
from graphwright.lower.replay import Replay
from graphwright.lower.views import collapse
from graphwright.memory import keep_heap
from graphwright.ops import VIEW


@dataclass(eq=False)
class Step:
    """One call.

    Attributes:
        reads, writes: registers.
        frees: registers whose value is dropped after the call.
        site: of the work, or of the value that is converted.
        name: the candidate's name, or ``"convert native→q"``.
        work: the work that it does; of a fused region, the first that computes.
        shares: registers in whose memory the results may lie.
        resident: the results may lie in memory that outlives the call, a constant's.
        clobbers: the register whose memory the call overwrites, and in which its result may lie.
        origin: its place among the steps in program order; -1 of a copy that was put in.
    """

    call: Callable[..., Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...]
    site: str
    name: str
    work: Work | None = None
    shares: tuple[int, ...] = ()
    resident: bool = False
    clobbers: int | None = None
    origin: int = -1


class Runner(nn.Module):
    """Flat input tensors to flat output tensors, mutations applied."""

    def __init__(self, program: Program, steps: Sequence[Step], registers: int, inputs: Sequence[int],
                 buffers: Sequence[tuple[int, str]], outputs: Sequence[int | Any]):  # fmt: skip
        super().__init__()
        self.program = program
        self.steps = tuple(steps)
        self._registers, self._inputs, self._buffers, self._outputs = registers, tuple(inputs), tuple(buffers), tuple(outputs)
        self.base: Base | None = None
        self._poison = os.environ.get("GRAPHWRIGHT_POISON") == "1"
        cuda = accelerator.of(accelerator.device_of(program))
        self.cuda = cuda
        self.replay = None if cuda is None else Replay(self.launched, program, cuda)
        keep_heap()
        self._code = [(s.call, s.reads, s.writes[0] if len(s.writes) == 1 else s.writes, s.frees) for s in steps]

    def _start(self, leaves: Sequence[Tensor]) -> list[Any]:
        registers: list[Any] = [None] * self._registers
        for slot, leaf in zip(self._inputs, leaves, strict=True):
            registers[slot] = leaf
        for slot, name in self._buffers:
            registers[slot] = self.program.tensor(name)
        return registers

    def _finish(self, registers: list[Any], leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        outs = [registers[o.slot] if isinstance(o, Register) else o for o in self._outputs]
        mutations = self.program.signature.mutations
        count = len(outs) - len(mutations)
        for mutation, value in zip(mutations, outs[count:], strict=True):
            target = leaves[mutation.input] if mutation.buffer is None else self.program.tensor(mutation.buffer)
            target.copy_(value)
        return tuple(outs[:count])

    @property
    def resident(self) -> set[int]:
        """Registers of inputs, buffers and results: what lies there outlives the steps."""
        return {*self._inputs, *(slot for slot, _ in self._buffers), *(o.slot for o in self._outputs if isinstance(o, Register))}

    def forward(self, *leaves: Tensor) -> tuple[Any, ...]:
        if self._poison:
            return run_poisoned(self, leaves)
        if self.replay is None:
            return self.launched(leaves)
        with accelerator.on(self.replay.device):
            return self.replay(leaves)

    def launched(self, leaves: Sequence[Tensor]) -> tuple[Any, ...]:
        """The steps, one call after the other."""
        # below autograd, each call skips a dispatch; unlike inference mode, results stay ordinary tensors
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            registers = self._start(leaves)
            for call, reads, writes, frees in self._code:
                result = call(*[registers[r] for r in reads])
                if type(writes) is int:
                    registers[writes] = result
                else:
                    for slot, value in zip(writes, result, strict=True):
                        registers[slot] = value
                    value = None  # nor may this name keep it
                for slot in frees:
                    registers[slot] = None
            return self._finish(registers, leaves)

    def watched(self, leaves: Sequence[Tensor], see: Callable[[Step | None, int, int, Sequence[Any], Any], None]) -> tuple[Any, ...]:
        """``forward``, with ``see(step, begin, end, arguments, result)`` after each step, in ns; None as step: mutations written."""
        clock = time.perf_counter_ns
        wait = self.cuda.wait if self.cuda is not None else lambda: None
        wait()
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            registers = self._start(leaves)
            for step, (call, reads, writes, frees) in zip(self.steps, self._code, strict=True):
                args: Any = [registers[r] for r in reads]
                begin = clock()
                result = call(*args)
                wait()
                end = clock()
                see(step, begin, end, args, result)
                for slot, value in zip((writes,), (result,), strict=True) if type(writes) is int else zip(writes, result, strict=True):
                    registers[slot] = value
                args = result = value = None  # held no longer than forward holds them
                for slot in frees:
                    registers[slot] = None
            begin = clock()
            outs = self._finish(registers, leaves)
            wait()
            if self.program.signature.mutations:
                see(None, begin, clock(), (), ())
            return outs

    @torch.no_grad()
    def step_through(self, leaves: Sequence[Tensor], do: Callable[[Step, list[Any]], Any]) -> None:
        """Run with ``do(step, arguments)`` in the place of each call; its answer is the step's. Mutations are not applied."""
        registers = self._start(leaves)
        for step, (_, reads, writes, frees) in zip(self.steps, self._code, strict=True):
            result = do(step, [registers[r] for r in reads])
            for slot, value in zip((writes,), (result,), strict=True) if type(writes) is int else zip(writes, result, strict=True):
                registers[slot] = value
            for slot in frees:
                registers[slot] = None

    def profile(self, leaves: Sequence[Tensor], rounds: int = 3) -> list[float]:
        """Least milliseconds of each step over ``rounds`` runs."""
        best: dict[int, float] = {}
        clock = accelerator.Clock(self.cuda)

        def timed(step: Step, args: list[Any]) -> Any:
            results: list[Any] = []
            took = clock.once(lambda: results.append(step.call(*args)))
            best[id(step)] = min(best.get(id(step), float("inf")), 1e3 * took)
            return results[0]

        for _ in range(rounds):
            self.step_through(leaves, timed)
        return [best[id(s)] for s in self.steps]


@dataclass(frozen=True)
class Register:
    slot: int


@dataclass(frozen=True, eq=False)
class Base:
    """What a runner is put together from: steps in program order, each register written once.

    Attributes:
        shared: registers that may share memory with another, an input or a buffer.
        returned: registers of results.
    """

    program: Program
    steps: tuple[Step, ...]
    count: int
    inputs: tuple[int, ...]
    buffers: tuple[tuple[int, str], ...]
    outputs: tuple[int | Any, ...]
    shared: frozenset[int]

    @property
    def returned(self) -> set[int]:
        return {o.slot for o in self.outputs if isinstance(o, Register)}


def settle(base: Base, sequence: Sequence[int] | None = None, *, apart: bool = False) -> Runner:
    """The steps in an order, copies where one would overwrite what is still read, and registers freed after their last reader.

    Args:
        sequence: positions among ``base.steps``, see ``graphwright.lower.arrange``; program order by default.
        apart: no step writes over what it reads, unless it must.
    """
    steps, count, shared = arranged(base, sequence)
    steps, count = protected(steps, count, shared, base.returned)
    steps = steps if apart else reuse(steps, shared, base.returned)
    runner = Runner(base.program, freed(steps, base.returned), count, base.inputs, base.buffers, base.outputs)
    runner.base = base
    return runner


@dataclass(frozen=True)
class Fused:
    """A region that runs as one call.

    Attributes:
        name: ``"inductor.region1"``.
        call: tensors of ``region.reads`` to those of ``region.writes``: one by itself, several in a tuple or list.
        fresh: what it gives shares memory with nothing.
        needs, gives: the forms of what it reads and gives; all native where there are none.
    """

    region: Region
    name: str
    call: Callable[..., Any]
    fresh: bool = False
    needs: tuple[Format, ...] = ()
    gives: tuple[Format, ...] = ()


def emit(analysis: Analysis, chosen: Sequence[tuple[Candidate, Callable[..., Any]]], fused: Sequence[Fused] = (), *,
          apart: bool = False, sequence: Sequence[int] | None = None) -> Runner:  # fmt: skip
    """Put the chosen implementations in program order, conversions just before their first reader.

    Args:
        fused: regions that run as one call, in the place of what was chosen for their works.
        apart: every view stays a step of its own, so that each work's step reads what the work reads, and elementwise ops leave
            what they read as it is.
        sequence: see ``settle``.

    Raises:
        InternalError: a form is read that nothing gives and nothing converts to.
    """
    return settle(_Emitter(analysis, chosen, fused).run(apart), sequence, apart=apart)


class _Emitter:
    def __init__(self, analysis: Analysis, chosen: Sequence[tuple[Candidate, Callable[..., Any]]], fused: Sequence[Fused]):
        self.analysis = analysis
        self.chosen = dict(zip(analysis.works, chosen, strict=True))
        self.fused = {f.region: f for f in fused}
        self.slots: dict[tuple[fx.Node, Format], int] = {}
        self.forms: dict[fx.Node, list[Format]] = {}  # those of each value that have a register
        self.count = 0
        self.steps: list[Step] = []
        self.borrowed: set[int] = set()  # registers that may share memory with another, an input or a buffer

    def run(self, apart: bool) -> Base:
        program = self.analysis.program
        inputs = [self._new(n, NATIVE) for n in program.placeholders]
        buffers = [(self._new(n, NATIVE), str(n.target)) for n in program.graph.nodes
                   if n.op == "get_attr" and program.constant(n) is None]  # fmt: skip
        self.borrowed.update(inputs, (b for b, _ in buffers))
        for work in schedule(self.analysis, list(self.fused)):
            if isinstance(work, Region):
                self._region(self.fused[work])
                continue
            candidate, call = self.chosen[work]
            reads = tuple(self._form(r.value, f) for r, f in zip(work.reads, candidate.needs, strict=True))
            writes = tuple(self._new(work.node, f) for f in candidate.gives)
            aliases = candidate.aliases or work.has(VIEW)
            if aliases:
                self.borrowed.update(writes)
                self.borrowed.update(reads)
            self.steps.append(Step(call, reads, writes, (), work.site, candidate.name, work, reads if aliases else (), aliases and not reads,
                                   None if candidate.clobbers is None else reads[candidate.clobbers]))  # fmt: skip
        outputs = [Register(self._form(o.value, NATIVE)) if isinstance(o, Read) else o for o in self.analysis.outputs]
        returned = {o.slot for o in outputs if isinstance(o, Register)}
        self.steps = self.steps if apart else collapse(self.steps, returned)
        steps = tuple(replace(step, origin=k) for k, step in enumerate(self.steps))
        return Base(program, steps, self.count, tuple(inputs), tuple(buffers), tuple(outputs), frozenset(self.borrowed))

    def _region(self, fused: Fused) -> None:
        region = fused.region
        reads = tuple(self._form(value, form) for value, form in zip(region.reads, fused.needs or [NATIVE] * len(region.reads), strict=True))
        writes = tuple(self._new(value, form) for value, form in zip(region.writes, fused.gives or [NATIVE] * len(region.writes), strict=True))
        if not fused.fresh:
            self.borrowed.update(reads, writes)  # what it gives may be several views of one tensor
        self.steps.append(Step(fused.call, reads, writes, (), region.head.site, fused.name, region.head, () if fused.fresh else reads))

    def _new(self, value: fx.Node, form: Format) -> int:
        self.slots[value, form] = self.count
        self.forms.setdefault(value, []).append(form)
        self.count += 1
        return self.count - 1

    def _form(self, value: fx.Node, form: Format) -> int:
        """The register that holds ``value`` as ``form``; a conversion is added where none does."""
        if (value, form) in self.slots:
            return self.slots[value, form]
        forms = self.forms.get(value, ())
        # rows alone where a plan's reader of them can't be built here: what they stand for serves
        sources = [f for f in forms if possible(f, form)] or [f for f in forms if f.kind == "rows"]
        if not sources and (value, NATIVE) not in self.slots:
            constant = self.analysis.program.constant(value)
            if constant is not None:  # a constant that the program returns as it is
                slot = self._new(value, NATIVE)
                self.steps.append(Step(lambda: constant, (), (slot,), (), value.name, "constant", resident=True))
                return slot
            raise InternalError(f"no form of {value.name} gives {form}", program=self.analysis.program.text())
        source = min(sources, key=lambda f: (f.kind != form.kind, f.kind != "native", f.layout != form.layout))
        call = conversion(source, form, self.analysis.qparams.get(value), value.meta["val"])
        read = self.slots[value, source]
        slot = self._new(value, form)
        shares = (read,) if source.kind == form.kind else ()
        if shares:
            self.borrowed.update((slot, read))
        site = (value.meta.get("sites") or (value.name,))[0]
        self.steps.append(Step(call, (read,), (slot,), (), site, f"convert {source}→{form}", shares=shares))
        return slot
