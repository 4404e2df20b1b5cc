"""Random small models for property tests: whatever passes rewrite, in whatever order, with values that are read twice.

``random_model(rng)`` takes any ``random.Random``; hypothesis's ``st.randoms(use_true_random=False)`` makes it shrink.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Makes, for inputs of some shapes, what computes the next value; None where it has nothing to say about them.
Maker = Callable[[random.Random, list[Tensor]], "Callable[..., Tensor] | nn.Module | None"]


@dataclass
class Step:
    """One value: what computes it, from which earlier ones."""

    name: str
    call: Callable[..., Tensor]
    reads: tuple[int, ...]


class RandomModel(nn.Module):
    """Steps in a row; gives the values that nothing reads, at most three."""

    def __init__(self, steps: list[Step], modules: list[nn.Module], tensors: list[Tensor]):
        super().__init__()
        self.steps, self.parts = steps, nn.ModuleList(modules)
        for k, t in enumerate(tensors):
            self.register_buffer(f"t{k}", t)
        read = {r for s in steps for r in s.reads}
        self.outs = [k for k in range(len(steps) + 1) if k not in read][-3:]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step in self.steps:
            values.append(step.call(self, *(values[r] for r in step.reads)))
        return tuple(values[k] for k in self.outs)

    def __repr__(self) -> str:
        lines = [f"v{k} = {s.name}({', '.join(f'v{r}' for r in s.reads)})" for k, s in enumerate(self.steps, 1)]
        return "; ".join(lines) + f" -> {self.outs}"


class _Builder:
    def __init__(self, rng: random.Random):
        self.rng = rng
        self.steps: list[Step] = []
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self.values: list[Tensor] = []
        self.order: list[int] = []  # of the last permute: its inverse is likely to come

    def module(self, part: nn.Module) -> Callable[..., Tensor]:
        place = len(self.modules)
        self.modules.append(part)
        return lambda model, *a: model.parts[place](*a)

    def constant(self, tensor: Tensor) -> Callable[[RandomModel], Tensor]:
        place = len(self.tensors)
        self.tensors.append(tensor)
        return lambda model: getattr(model, f"t{place}")

    def again(self, kind: type[nn.Module]) -> nn.Module | None:
        """A module that stands in the model already: weights are shared."""
        return next((m for m in reversed(self.modules) if isinstance(m, kind)), None)


def random_model(rng: random.Random, *, images: bool | None = None, steps: int | None = None) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and an input, ``[2, 4, 6, 6]`` or ``[2, 6, 8]``; numbers are drawn by torch's generator."""
    images = rng.random() < 0.5 if images is None else images
    b = _Builder(rng)
    x = torch.randn(2, 4, 6, 6) if images else torch.randn(2, 6, 8)
    b.values.append(x)
    wanted = steps or rng.randint(2, 12)
    for _ in range(wanted * 2):
        # one step, or several that passes look for one after the other
        names = [rng.choice(list(KINDS))] if rng.random() < 0.4 else rng.choice(IDIOMS)
        # from the last value most of the time, so that chains grow; from an older one at times, so that they branch
        first = len(b.values) - 1 if rng.random() < 0.75 else rng.randrange(len(b.values))
        for name in names:
            if _add(b, name, first):
                first = len(b.values) - 1
        if len(b.steps) >= wanted:
            break
    return RandomModel(b.steps, b.modules, b.tensors).eval(), x


def _add(b: _Builder, name: str, first: int) -> bool:
    made = KINDS[name](b, b.values[first])
    if made is None:
        return False
    call, more = made
    if name == "parallel":
        first = b.steps[-1].reads[0]
    reads = (first, *more)
    probe = RandomModel([], b.modules, b.tensors).eval()
    with torch.no_grad():
        value = call(probe, *(b.values[r] for r in reads))
    if value.numel() > 4000 or not value.numel() or not bool(torch.isfinite(value).all()) or value.abs().max() > 1e4:
        return False
    b.steps.append(Step(name, call, reads))
    b.values.append(value)
    return True


Made = tuple[Callable[..., Tensor], tuple[int, ...]] | None


def _conv(b: _Builder, x: Tensor) -> Made:
    if x.ndim not in (3, 4) or min(x.shape[2:]) < 3:
        return None
    r, c = b.rng, x.shape[1]
    cls = (nn.Conv1d, nn.Conv2d)[x.ndim - 3]
    shared = b.again(cls)
    if shared is not None and shared.in_channels == c and r.random() < 0.3:
        place = next(k for k, m in enumerate(b.modules) if m is shared)
        return (lambda model, a: model.parts[place](a)), ()
    groups = r.choice([1, 1, 1, c, 2]) if c % 2 == 0 else 1
    kernel = r.choice([1, 1, 3])
    part = cls(c, r.choice([2, 4, 6, 8]) * (c if groups == c else 1), kernel, stride=r.choice([1, 1, 2]), padding=r.choice([0, kernel // 2]),
               groups=groups, bias=r.random() < 0.6)  # fmt: skip
    return b.module(part), ()


def _parallel(b: _Builder, x: Tensor) -> Made:
    """A second convolution or linear beside one that reads the same value."""
    if not b.steps:
        return None
    before = b.steps[-1]
    if before.name not in ("conv", "linear"):
        return None
    return None if len(before.reads) != 1 else KINDS[before.name](b, b.values[before.reads[0]])


def _transposed(b: _Builder, x: Tensor) -> Made:
    if x.ndim != 4 or x.shape[-1] > 8:
        return None
    c, groups = x.shape[1], b.rng.choice([1, 1, 2]) if x.shape[1] % 2 == 0 else 1
    return b.module(nn.ConvTranspose2d(c, 4 * groups, b.rng.choice([1, 2]), stride=b.rng.choice([1, 2]), groups=groups, bias=b.rng.random() < 0.5)), ()


def _linear(b: _Builder, x: Tensor) -> Made:
    return b.module(nn.Linear(x.shape[-1], b.rng.choice([2, 4, 8]), bias=b.rng.random() < 0.6)), ()


def _norm(b: _Builder, x: Tensor) -> Made:
    if x.ndim not in (2, 3, 4):
        return None
    part = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[x.ndim - 2](x.shape[1], affine=b.rng.random() < 0.8)
    with torch.no_grad():
        part.running_mean.normal_()
        part.running_var.uniform_(0.3, 2)
        if part.affine:
            part.weight.normal_()
            part.bias.normal_()
    return b.module(part), ()


def _layer_norm(b: _Builder, x: Tensor) -> Made:
    return (b.module(nn.LayerNorm(x.shape[-1])), ()) if x.shape[-1] > 1 else None


def _plain(*functions: Callable[[Tensor], Tensor]) -> Callable[[_Builder, Tensor], Made]:
    def make(b: _Builder, x: Tensor) -> Made:
        f = b.rng.choice(functions)
        return (lambda model, a: f(a)), ()

    return make


def _number(b: _Builder, x: Tensor) -> Made:
    number = b.rng.choice([0.5, 2.0, 3.0, -1.5, 1.0, 0.0, 2, 0.125])
    f = b.rng.choice([lambda a: a * number, lambda a: a + number, lambda a: a - number, lambda a: number - a, lambda a: number * a + 1,
                      lambda a: a / (number or 4.0)])  # fmt: skip
    return (lambda model, a: f(a)), ()


def _constant(b: _Builder, x: Tensor) -> Made:
    """Scale or shift by a constant along one axis, or all."""
    axis = b.rng.randrange(x.ndim)
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    if b.rng.random() < 0.2:
        shape = []
    held = b.constant(torch.randn(shape).abs() + 0.3)
    f = b.rng.choice([torch.mul, torch.add, torch.sub, torch.div])
    return (lambda model, a: f(a, held(model))), ()


def _two(b: _Builder, x: Tensor) -> Made:
    same = [k for k, v in enumerate(b.values) if v.shape == x.shape]
    other = b.rng.choice(same)
    f = b.rng.choice([torch.add, torch.add, torch.mul, torch.sub])
    return (lambda model, a, c: f(a, c)), (other,)


def _cat(b: _Builder, x: Tensor) -> Made:
    axis = b.rng.randrange(x.ndim)
    fits = [k for k, v in enumerate(b.values) if v.ndim == x.ndim and all(n == m for d, (n, m) in enumerate(zip(v.shape, x.shape, strict=True)) if d != axis)]
    others = tuple(b.rng.choice(fits) for _ in range(b.rng.choice([0, 1, 1, 2])))
    return (lambda model, *a: torch.cat(a, axis)), others


def _parts(b: _Builder, x: Tensor) -> Made:
    """Split, and put the parts together again: in order, out of order, or after something happened to them."""
    axis = b.rng.randrange(x.ndim)
    n = x.shape[axis]
    if n < 2:
        return None
    cut = b.rng.randrange(1, n)
    split = b.rng.choice([lambda a: torch.split(a, [cut, n - cut], axis), lambda a: torch.chunk(a, 2, axis),
                          lambda a: (a.narrow(axis, 0, cut), a.narrow(axis, cut, n - cut))])  # fmt: skip
    join = b.rng.choice([lambda p: torch.cat(p, axis), lambda p: torch.cat(p[::-1], axis), lambda p: torch.cat([p[0].relu(), *p[1:]], axis), lambda p: p[0], lambda p: p[-1]])
    return (lambda model, a: join(split(a))), ()


def _slice(b: _Builder, x: Tensor) -> Made:
    axis = b.rng.randrange(x.ndim)
    n = x.shape[axis]
    start, step = b.rng.randrange(n), b.rng.choice([1, 1, 2])
    end = b.rng.randint(start + 1, n)
    key = (slice(None),) * axis
    if b.rng.random() < 0.3 and x.ndim > 2:
        return (lambda model, a: a[(*key, start)]), ()
    return (lambda model, a: a[(*key, slice(start, end, step))]), ()


def _permute(b: _Builder, x: Tensor) -> Made:
    order = list(range(x.ndim))
    if len(b.order) == x.ndim and b.rng.random() < 0.6:
        order = [b.order.index(k) for k in order]
    elif b.rng.random() < 0.5:
        order = [0, *order[2:], 1] if b.rng.random() < 0.5 else [0, order[-1], *order[1:-1]]
    else:
        i, j = b.rng.randrange(x.ndim), b.rng.randrange(x.ndim)
        order[i], order[j] = order[j], order[i]
    b.order = order
    return (lambda model, a: a.permute(order)), ()


def _reshape(b: _Builder, x: Tensor) -> Made:
    sizes = list(x.shape)
    k = b.rng.randrange(len(sizes))
    if b.rng.random() < 0.5 and sizes[k] % 2 == 0 and len(sizes) < 5:
        sizes[k : k + 1] = [2, sizes[k] // 2] if b.rng.random() < 0.5 else [sizes[k] // 2, 2]
    elif k + 1 < len(sizes) and len(sizes) > 2:
        sizes[k : k + 2] = [sizes[k] * sizes[k + 1]]
    else:
        return None
    return (lambda model, a: a.reshape(sizes)), ()


def _reduce(b: _Builder, x: Tensor) -> Made:
    axes = sorted(b.rng.sample(range(x.ndim), b.rng.choice([1, 1, 2])))
    keep = b.rng.random() < 0.5
    if not keep and x.ndim - len(axes) < 2:
        return None
    f = b.rng.choice([torch.mean, torch.mean, torch.amax, torch.sum])
    return (lambda model, a: f(a, axes, keepdim=keep)), ()


def _pool(b: _Builder, x: Tensor) -> Made:
    if x.ndim not in (3, 4) or min(x.shape[2:]) < 2:
        return None
    average, largest = ((F.avg_pool1d, F.max_pool1d), (F.avg_pool2d, F.max_pool2d))[x.ndim - 3]
    f = b.rng.choice([lambda a: average(a, 2), lambda a: average(a, 2, 1), lambda a: average(a, 2, padding=1), lambda a: average(a, 2, padding=1, count_include_pad=False),
                      lambda a: largest(a, 2)] + ([lambda a: F.adaptive_avg_pool2d(a, 1), lambda a: F.adaptive_avg_pool2d(a, 2)] if x.ndim == 4 else []))  # fmt: skip
    return (lambda model, a: f(a)), ()


def _softmax(b: _Builder, x: Tensor) -> Made:
    axis = b.rng.randrange(x.ndim)
    return (lambda model, a: a.softmax(axis)), ()


def _uniform(b: _Builder, x: Tensor) -> Made:
    """Masks that are the same everywhere."""
    f = b.rng.choice([
        lambda a: a * torch.ones_like(a), lambda a: a.masked_fill(torch.zeros(a.shape, dtype=torch.bool), -1.0), lambda a: a + torch.zeros(a.shape[-1], dtype=a.dtype),
        lambda a: torch.where(torch.ones(a.shape[-1], dtype=torch.bool), a, a * 2), lambda a: a + (1.0 - torch.ones(a.shape, dtype=a.dtype)) * -1e9,
    ])  # fmt: skip
    return (lambda model, a: f(a)), ()


KINDS: dict[str, Callable[[_Builder, Tensor], Made]] = {
    "conv": _conv,
    "parallel": _parallel,
    "transposed": _transposed,
    "linear": _linear,
    "norm": _norm,
    "layer norm": _layer_norm,
    "activation": _plain(F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, torch.tanh, torch.sigmoid,
                         lambda a: a.clamp(-1, 1), lambda a: F.gelu(a, approximate="tanh")),
    "odd": _plain(lambda a: -a, lambda a: a.neg().neg(), lambda a: a.pow(2), lambda a: a.abs().sqrt(), lambda a: a * 1, lambda a: a + 0.0, lambda a: a.contiguous().clone(),
                  lambda a: a.double().to(a.dtype), lambda a: a.unsqueeze(0).squeeze(0), lambda a: F.dropout(a, 0.5, False)),
    "number": _number,
    "constant": _constant,
    "two": _two,
    "cat": _cat,
    "parts": _parts,
    "slice": _slice,
    "permute": _permute,
    "reshape": _reshape,
    "reduce": _reduce,
    "pool": _pool,
    "softmax": _softmax,
    "uniform": _uniform,
}  # fmt: skip
#: What passes look for, as steps one after the other; a step that does not fit is left out.
IDIOMS = [
    s.split(", ")
    for s in (
        "conv, norm, activation", "conv, norm, two, activation", "norm, conv", "norm, linear", "linear, norm", "transposed, norm", "conv, constant, activation",
        "linear, number", "linear, reshape, permute, number", "linear, permute, constant", "conv, reshape, constant", "constant, conv", "number, conv",
        "constant, number, linear", "number, permute, linear", "constant, conv, parallel", "permute, activation, permute", "permute, constant, permute",
        "permute, activation, two, permute", "permute, linear, activation, linear, permute", "permute, softmax, permute", "permute, reduce",
        "permute, parts, permute", "reshape, activation, reshape", "linear, linear", "linear, reshape, linear", "conv, conv", "conv, number, conv", "conv, pool",
        "linear, reduce", "conv, reduce", "linear, slice", "linear, activation, slice", "layer norm, slice", "conv, slice", "two, slice", "cat, parts", "cat, slice",
        "cat, cat", "cat, reduce", "parts, parts", "conv, parallel, cat", "conv, parallel, parallel, two", "linear, parallel, cat", "linear, parallel, parallel",
        "odd, odd", "number, number", "number, odd", "uniform, linear", "pool, conv, pool",
    )
]  # fmt: skip
