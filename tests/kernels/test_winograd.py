"""What samples do not say about the float products and the convolution made of them: remainders, digits, threads, layouts."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphwright.kernels import conv2d_winograd, fma
from graphwright.kernels.native import Native, unavailable
from graphwright.kernels.tile import i64
from graphwright.numerics import Exact
from graphwright.ops.fused import activate

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
LAST = torch.channels_last


def _whole_product(params):  # compiled
    p = i64(params)
    fma.products(p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[5], p[11])


_PRODUCT = Native(_whole_product, "q" * 10)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: tuple[int, int] = (1, 1), other: Tensor | None = None,
          activation: str = "none", scalars: tuple[float, ...] = ()) -> Tensor:  # fmt: skip
    return conv2d_winograd.run(x, weight, bias, padding, other, activation, scalars)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [*range(1, 15), 49])
@pytest.mark.parametrize(("depth", "columns"), [(1, 16), (7, 48), (33, 112)])
def test_products_over_all_remainders(rows: int, depth: int, columns: int) -> None:
    g = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, depth + 3, generator=g)  # rows with something between them
    a, b = wide[:, :depth], torch.randn(depth, columns, generator=g)
    c = torch.full((rows + 1, columns + 16), 7.0)
    where = a.data_ptr(), a.stride(0) * 4, rows, b.data_ptr(), columns * 4, columns // 16, depth, c.data_ptr(), c.stride(0) * 4
    _PRODUCT(1, *where, 0)
    once = c.clone()
    _PRODUCT(1, *where, 1)
    assert torch.equal(c[:rows, :columns], 2 * once[:rows, :columns])
    c = once
    assert Exact().failure(a.double() @ b.double(), a @ b, c[:rows, :columns].contiguous()) is None
    assert (c[rows] == 7).all() and (c[:, columns:] == 7).all()


def _inputs(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g)
    return {"normal": x, "relu": x.relu(), "far": x + 100, "constant": torch.ones(shape), "heavy": x**5}[kind]


@pytest.mark.parametrize("channels", [1, 16, 100, 256, 512, 2048])
@pytest.mark.parametrize("kind", ["normal", "relu", "far", "constant", "heavy"])
def test_no_further_from_float64_than_exactness_allows(channels: int, kind: str) -> None:
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        x, bias = _inputs(kind, (1, channels, 9, 7), g), torch.randn(24, generator=g)
        for weight in (torch.randn(24, channels, 3, 3, generator=g) / channels**0.5, torch.rand(24, channels, 3, 3, generator=g)):
            eager = F.conv2d(x.contiguous(memory_format=LAST), weight, bias, 1, 1)
            assert Exact().failure(F.conv2d(x.double(), weight.double(), bias.double(), 1, 1), eager, _conv(x, weight, bias)) is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    size = lambda low, high: data.draw(st.integers(low, high))
    n, c, o, above, left = size(1, 3), size(1, 40), size(1, 90), size(0, 3), size(0, 3)
    h, w = size(max(1, 3 - 2 * above), 12), size(max(1, 3 - 2 * left), 12)
    g = torch.Generator().manual_seed(size(0, 2**31))
    x, weight = torch.randn(n, c, h, w, generator=g), torch.randn(o, c, 3, 3, generator=g)
    bias = torch.randn(o, generator=g) if data.draw(st.booleans()) else None
    activation, scalars = data.draw(st.sampled_from([("none", ()), ("relu", ()), ("hardtanh", (-1.0, 2.0)), ("hardswish", ()), ("gelu", ())]))
    wide = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), 1, (above, left))
    other = torch.randn(wide.shape, generator=g) if data.draw(st.booleans()) else None
    wide = wide if other is None else wide + other
    if activation != "none":
        wide = getattr(F, activation)(wide, *scalars)
    got = _conv(x, weight, bias, (above, left), other, activation, scalars)
    torch.testing.assert_close(got.double(), wide, rtol=1e-5, atol=2e-6 * (9 * c) ** 0.5)
    assert got.is_contiguous(memory_format=LAST)


def test_the_number_of_threads_changes_no_bit(threads) -> None:
    g = torch.Generator().manual_seed(0)
    for n, c, h, w, o in ((1, 32, 30, 31, 64), (3, 64, 7, 7, 200), (1, 16, 5, 5, 16)):
        x, weight, other = torch.randn(n, c, h, w, generator=g), torch.randn(o, c, 3, 3, generator=g), torch.randn(n, o, h, w, generator=g)
        found = []
        for count in (1, 2, 3):
            threads(count)
            found.append(_conv(x, weight, None, (1, 1), other, "relu"))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_one_packed_convolution_serves_every_size_and_layout() -> None:
    g = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(70, 20, 3, 3, generator=g, requires_grad=True), torch.randn(70, generator=g)
    conv = conv2d_winograd.Convolution(conv2d_winograd.pack(weight, bias), (1, 2), "none", ())
    for n, h, w in ((1, 40, 33), (2, 3, 1), (1, 1, 90), (0, 4, 4), (1, 40, 33)):
        x = torch.randn(n, 20, h, w, generator=g)
        wanted = F.conv2d(x.double(), weight.double(), bias.double(), 1, (1, 2)).detach()
        for laid_out in (x, x.contiguous(memory_format=LAST), x.transpose(2, 3).contiguous().transpose(2, 3), x.expand(x.shape)):
            kept = laid_out.clone()
            torch.testing.assert_close(conv(laid_out).double(), wanted, rtol=1e-5, atol=1e-4)
            assert torch.equal(laid_out, kept)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_numbers_that_are_not_finite_go_where_they_always_go(strange: float, activation: str) -> None:
    g = torch.Generator().manual_seed(2)
    x, weight, other = torch.randn(2, 16, 11, 12, generator=g), torch.randn(20, 16, 3, 3, generator=g), torch.randn(2, 20, 11, 12, generator=g)
    bias = torch.randn(20, generator=g)
    x[1, 3, 5, 6], x[0, 2, 0, 11] = strange, strange
    wanted = activate(F.conv2d(x, weight, bias, padding=1) + other, activation)
    torch.testing.assert_close(_conv(x, weight, bias, other=other, activation=activation), wanted, equal_nan=True)


def _fenced(x: Tensor, behind: bool) -> Tensor:
    """The same numbers, channels last where there are four axes, at the end (or the beginning) of pages between forbidden ones."""
    libc, page = ctypes.CDLL(None), 4096
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size, pages = x.numel() * 4, -(-x.numel() * 4 // page) + 2
    start = libc.mmap(None, pages * page, 3, 0x22, -1, 0)
    for fence in (0, pages - 1):
        assert libc.mprotect(start + fence * page, page, 0) == 0
    first = start + (pages - 1) * page - size if behind else start + page
    last = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
    there = torch.frombuffer((ctypes.c_float * x.numel()).from_address(first), dtype=torch.float32).reshape(last.shape)
    there.copy_(last)
    return there.permute(0, 3, 1, 2) if x.ndim == 4 else there


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(("c", "o", "h", "w", "padding"), [(24, 40, 4, 4, (0, 0)), (17, 33, 6, 7, (0, 1)), (64, 64, 8, 8, (1, 1)), (3, 5, 5, 9, (2, 0))])
def test_nothing_outside_is_touched(monkeypatch, behind: bool, c: int, o: int, h: int, w: int, padding: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(2, c, h, w, generator=g), torch.randn(o, c, 3, 3, generator=g)
    wanted = F.conv2d(x.double(), weight.double(), None, 1, padding)
    packed = conv2d_winograd.pack(weight, None)
    packed = replace(packed, weight=_fenced(packed.weight, behind), bias=_fenced(packed.bias, behind))
    conv = conv2d_winograd.Convolution(packed, padding, "none", ())
    x, other, out = _fenced(x, behind), _fenced(torch.ones(wanted.shape), behind), _fenced(torch.zeros(wanted.shape), behind)
    held: list[Tensor] = []

    def scratch(size: int) -> int:
        held.append(_fenced(torch.zeros(size // 4), behind))
        return held[-1].data_ptr()

    monkeypatch.setattr(conv2d_winograd, "scratch", scratch)
    monkeypatch.setattr(torch, "empty_strided", lambda *_: out)
    torch.testing.assert_close(conv(x, other).double(), wanted + 1, rtol=1e-5, atol=1e-4)


def test_calls_at_the_same_time_do_not_meet() -> None:
    g = torch.Generator().manual_seed(4)
    convs = [conv2d_winograd.Convolution(conv2d_winograd.pack(torch.randn(64, 32, 3, 3, generator=g), None), (1, 1), "relu", ()) for _ in range(4)]
    x = torch.randn(1, 32, 24, 24, generator=g)
    alone = [conv(x) for conv in convs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for got, wanted in zip(pool.map(lambda conv: conv(x), convs), alone, strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize(("change", "words"), [
    ({"x": torch.randn(1, 16, 5, 5).double()}, "float64"),
    ({"x": torch.randn(16, 5, 5)}, "3 axes"),
    ({"weight": torch.randn(8, 16, 1, 3)}, "wanted"),
    ({"weight": torch.randn(8, 8, 3, 3)}, "groups"),
    ({"weight": torch.randn(1, 2049, 3, 3)}, "digits"),
    ({"padding": (-1, 1)}, "negative"),
    ({"x": torch.randn(1, 16, 2, 5), "padding": (0, 0)}, "smaller"),
    ({"other": torch.randn(1, 8, 1, 1)}, "residual"),
    ({"other": torch.randn(1, 8, 5, 5).double()}, "float64"),
    ({"activation": "softsign"}, "softsign"),
])  # fmt: skip
def test_what_is_refused_is_refused_with_a_reason(change: dict[str, object], words: str) -> None:
    args = {"x": torch.randn(1, 16, 5, 5), "weight": torch.randn(8, 16, 3, 3), "bias": None, "padding": (1, 1), "other": None,
            "activation": "none", "scalars": ()}  # fmt: skip
    assert conv2d_winograd.supports(**args) is None
    assert words in (conv2d_winograd.supports(**{**args, **change}) or "")
