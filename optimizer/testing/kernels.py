"""The one correctness check of kernels, Graphwright's own and registered ones: against the op's reference in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphwright.errors import CheckError, InputError, InternalError
from graphwright.kernel import Kernel, Sample
from graphwright.kernel_registry import registered, row_of
from graphwright.numerics import Exact, rms

#: Largest share of integer results that may differ (by the kernel's own number of steps).
RARELY = 2e-3

#: Arguments of more bytes than this are made where they are used, and not made a second time.
LARGE = 2**26


def arguments(kernel: Kernel, sample: Sample, seed: int = 0) -> tuple[Any, ...]:
    """A sample's arguments where the kernel runs: for GPUs on the current one (in Triton's interpreter on the CPU).

    Small samples are the same numbers everywhere; the large ones of the microbenchmark are drawn on the GPU where that can be done,
    since the CPU takes seconds for each.
    """
    device = _place(kernel)
    if device == "cpu" or not sample.bench:
        return _moved(sample.args(torch.Generator().manual_seed(seed)), device)
    try:
        with torch.device(device):
            return _moved(sample.args(torch.Generator(device).manual_seed(seed)), device)
    except (RuntimeError, NotImplementedError):  # it asks for tensors on the CPU, or for what is not there for the GPU
        return _moved(sample.args(torch.Generator().manual_seed(seed)), device)


def _place(kernel: Kernel) -> str:
    from graphwright.kernels.gpu import interpreting

    return "cuda" if kernel.device == "cuda" and torch.cuda.is_available() and not interpreting() else "cpu"


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(v, device) for v in value)
    if not isinstance(value, Tensor) or value.is_contiguous():
        return value.to(device) if isinstance(value, Tensor) else value
    held = value.untyped_storage().nbytes() // value.element_size()  # strides stay what they are: that is what the sample is for
    return value.as_strided((held,), (1,), 0).to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def check_kernel(kernel: Kernel | str, *, samples: Iterable[Sample] | None = None, threads: Sequence[int] = (1, 2), seed: int = 0) -> int:
    """Run a kernel on its samples, with one thread and with two, and hold it to its op's reference in float64.

    Floats: RMS error at most twice that of the reference in the arguments' own dtypes, plus 4 eps of the values' RMS (plus the kernel's own
    tolerance); infinities and NaN where the reference has them. Integers: few differ, by few steps (values on a rounding
    boundary). Shapes, dtypes and strides are the reference's; arguments stay as they were, and so do earlier results; what
    ``cost`` says is possible.

    Args:
        kernel: the record, or the name of a registered one: ``"numpy.softsign"``.
        samples: others than its own.
        threads: numbers of threads to run with.

    Returns:
        How many samples were checked.

    Raises:
        CheckError: a sample fails (each is named, with the reason), is refused, or there is none.
    """
    found = _found(kernel)
    several = list(samples if samples is not None else found.samples())
    if not several:
        raise CheckError(f"kernel {found.label} for {found.op} has no samples", hint='Give it some: samples=[gw.Sample("4x8", lambda g: (torch.randn(4, 8, generator=g),))].')
    failures = []
    before = torch.get_num_threads()
    try:
        for sample in several:
            for count in threads:
                torch.set_num_threads(count)
                if (problem := _problem(found, sample, seed)) is not None:
                    failures.append(f"{sample.name}, {count} thread{'s' if count > 1 else ''}: {problem}")
    finally:
        torch.set_num_threads(before)
    if failures:
        raise CheckError(f"{len(failures)} of {len(several) * len(threads)} checks fail" + "".join(f"\n    {f}" for f in failures),
                         where=f"kernel {found.label} for {found.op}")  # fmt: skip
    return len(several)


def _found(kernel: Kernel | str) -> Kernel:
    if isinstance(kernel, Kernel):
        return kernel
    known = {k.label: k for k in registered()}
    if kernel not in known:
        raise InputError(f"no kernel {kernel!r} is registered", where="check_kernel", hint=f"There are {', '.join(known) or 'none'}.")
    return known[kernel]


def _problem(kernel: Kernel, sample: Sample, seed: int) -> str | None:
    try:
        args = arguments(kernel, sample, seed)
        return disagreement(kernel, sample, seed, args) or _implausible(kernel, args)
    except Exception as error:  # noqa: BLE001  the kernel's own: it is named with its sample
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _implausible(kernel: Kernel, args: tuple[Any, ...]) -> str | None:
    """None, or why what ``cost`` says can't be."""
    cost = kernel.cost(*args)
    least = sum(t.numel() * t.element_size() for t in args if isinstance(t, Tensor) and t.ndim)
    if cost.flops < 0 or cost.bytes < min(1, least):
        return f"cost says {cost.flops} operations and {cost.bytes} bytes for arguments of {least} bytes"
    return None


def reference_of(kernel: Kernel) -> Any:
    """The body of the op's row."""
    row = row_of(kernel.op)
    if row is None:
        raise InternalError(f"kernel {kernel.op} has no row in the op table")
    return row.reference


def disagreement(kernel: Kernel, sample: Sample, seed: int = 0, args: tuple[Any, ...] | None = None) -> str | None:
    """None, or how the kernel differs from its op's reference in float64 on one sample; see ``check_kernel``. ``args``: the sample's, where
    they have been made already."""
    args = arguments(kernel, sample, seed) if args is None else args
    if (reason := kernel.supports(*args)) is not None:
        return f"refused: {reason}"
    reference = reference_of(kernel)
    kept = [t.clone() for t in _tensors(args)]
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # the references' float32 is to be float32 on a GPU too
        got = _list(kernel.run(*args))
        narrow = _list(reference(*args))
        wide = _list(reference(*[_widened(a) for a in args]))
    if len(got) != len(narrow):
        return f"{len(got)} results instead of {len(narrow)}"
    for before, after in zip(kept, _tensors(args), strict=True):
        if not torch.equal(_comparable(before), _comparable(after)):
            return "an argument was overwritten"
    for k, (value, near, far) in enumerate(zip(got, narrow, wide, strict=True)):
        if not isinstance(value, Tensor):
            return f"result {k}: a {type(value).__name__} instead of a tensor"
        if value.stride() != near.stride() and near.numel() and value.shape == near.shape:
            return f"result {k}: strides {value.stride()} instead of {near.stride()}"
        problem = _float_failure(kernel, value, near, far) if value.is_floating_point() else _integer_failure(value, near, far, kernel.tolerance[1])
        if problem is not None:
            return f"result {k}: {problem}"
    return None if sum(t.numel() * t.element_size() for t in _tensors(args)) > LARGE else _forgetful(kernel, sample, seed, got)


def _forgetful(kernel: Kernel, sample: Sample, seed: int, got: list[Tensor]) -> str | None:
    """None, or that a second call has changed what the first one gave."""
    kept = [t.clone() for t in got]
    with torch.no_grad():
        kernel.run(*arguments(kernel, sample, seed + 1))
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kept, got, strict=True))
    return None if same else "the next call overwrote the result: every call has to give new tensors"


def _float_failure(kernel: Kernel, value: Tensor, near: Tensor, far: Tensor) -> str | None:
    loose = kernel.tolerance[0]
    problem = Exact().failure(far, near, value)
    if problem and loose and value.shape == near.shape and value.dtype == near.dtype:
        finite = torch.isfinite(near)
        if rms((value.double() - far)[finite]) <= loose * rms(far[finite]):
            return None
    return problem


def _integer_failure(value: Tensor, near: Tensor, far: Tensor, steps: int) -> str | None:
    if value.shape != near.shape or value.dtype != near.dtype:
        return f"{tuple(value.shape)} {value.dtype} instead of {tuple(near.shape)} {near.dtype}"
    apart = (value.long() - far.long()).abs()
    if apart.numel() and int(apart.max()) > steps:
        return f"an element is {int(apart.max())} steps off; {steps} are allowed"
    count, allowed = int(apart.count_nonzero()), max(1, int(RARELY * apart.numel()))
    return None if count <= allowed else f"{count} of {apart.numel()} elements differ; {allowed} are allowed"


def _comparable(x: Tensor) -> Tensor:
    """x without NaN, which differs from itself; 8-bit floats, for which torch compares nothing, as their bits."""
    return x.view(torch.uint8) if x.is_floating_point() and x.element_size() == 1 else x.nan_to_num()


def _widened(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.double()
    return [_widened(v) for v in x] if isinstance(x, list) else x


def _list(out: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return list(out) if isinstance(out, (list, tuple)) else [out]


def _tensors(args: Any) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)
