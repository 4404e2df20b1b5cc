"""What samples do not say about the int8 products: exact integers, NaN, empty rows, shared heads, packed weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphwright.kernels import attention_int8, conv2d_int8, linear_int8, vnni
from graphwright.kernels.native import Native
from graphwright.ops import lowered

pytestmark = pytest.mark.skipif(vnni.unfit() is not None, reason=str(vnni.unfit()))

if vnni.unfit() is None:
    from graphwright.kernels.tile import i64

    def _whole_product(params):  # device code
        p = i64(params)
        vnni.products(p[2], p[3], p[4], 1, 0, p[5], p[6], p[7], p[8], p[9], p[10], p[5], 0, p[11])

    # a variable of its own, because device functions are found by the globals of the kernel's module
    _PRODUCT = Native(_whole_product, "q" * 10)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return attention_int8.run(q, k, v, mask, None, False, False, 1.0, 0, 0, 0, None)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 4, 16), (5, 8, 40), (13, 64, 100), (14, 12, 48), (24, 32, 128), (7, 76, 64), (6, 264, 64)])
def test_tiles_are_exact_over_all_remainders(m: int, k: int, n: int) -> None:
    g = torch.Generator().manual_seed(m)
    a = torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=g)
    b = torch.randint(-128, 128, (k, n), generator=g).to(torch.int8)
    packed = vnni.pack(b)
    c = torch.full((m, packed.shape[0] * 16), 7, dtype=torch.int32)
    for more in (0, 1):
        _PRODUCT(1, a.data_ptr(), k, m, packed.data_ptr(), packed.stride(0), packed.shape[0], packed.shape[1], c.data_ptr(), c.stride(0) * 4, more)
        assert torch.equal(c[:, :n], a.int() @ b.int() * (more + 1))
        assert not c[:, n:].any()


def test_extreme_integers_do_not_saturate() -> None:
    x = torch.full((3, 4096), 255, dtype=torch.uint8)
    weight = torch.full((16, 4096), -128, dtype=torch.int8)
    y = linear_int8.run(x, 1.0, 0, weight, torch.ones(16), None, None, "none", (), 1.0, 0, 0, 0, None, None, None)
    assert torch.equal(y, torch.full((3, 16), -255.0 * 128 * 4096))


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_reaches_what_depends_on_it_and_nothing_else(where: str) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(2, 2, 20, 16, generator=g) for name in ("query", "key", "value")}
    clean = _attend(*tensors.values())
    tensors[where][1, 0, 3, 5] = torch.nan
    bad = _attend(*tensors.values())
    assert torch.equal(bad[0], clean[0]) and torch.equal(bad[1, 1], clean[1, 1])
    hit = {"query": bad[1, 0, 3], "key": bad[1, 0], "value": bad[1, 0, :, 5]}[where]
    assert hit.isnan().all()
    if where == "query":
        assert torch.equal(bad[1, 0, :3], clean[1, 0, :3])


def test_rows_without_keys_are_zero_and_the_least_float_masks_evenly() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 5, 16, generator=g) for _ in range(3))
    allowed = torch.ones(5, 5, dtype=torch.bool)
    allowed[2] = False
    assert not _attend(q, k, v, allowed)[:, :, 2].any()
    low = torch.zeros(5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)
    torch.testing.assert_close(_attend(q, k, v, low)[:, :, 2], v.mean(2), atol=0.05, rtol=0.05)


def test_what_keys_have_in_common_costs_no_accuracy() -> None:
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 40, 32, generator=g) for _ in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    far = _attend(q, k + 100.0, v)
    assert (far - wanted).square().mean() < 1e-3 * wanted.square().mean()


def test_zeros_stay_zeros() -> None:
    zero = torch.zeros(1, 1, 3, 16)
    assert not _attend(zero, zero, zero).any()
    y = linear_int8.run(torch.zeros(2, 8), 1.0, 0, torch.ones(4, 8, dtype=torch.int8), torch.ones(4), torch.arange(4.0), None,
                        "none", (), 1.0, 0, 0, 0, None, None, None)  # fmt: skip
    assert torch.equal(y, torch.arange(4.0).expand(2, 4))


def test_rows_with_nan_or_infinity_give_nan_and_leave_the_others() -> None:
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(5, 24, generator=g), torch.randint(-127, 128, (7, 24), generator=g).to(torch.int8)

    def product() -> Tensor:
        return linear_int8.run(x, 1.0, 0, weight, torch.ones(7), None, None, "none", (), 1.0, 0, 0, 0, None, None, None)

    clean = product()
    x[1, 3], x[4, 0] = torch.nan, torch.inf
    bad = product()
    assert bad[[1, 4]].isnan().all() and torch.equal(bad[[0, 2, 3]], clean[[0, 2, 3]])


def test_a_weight_is_packed_once_for_many_calls() -> None:
    g = torch.Generator().manual_seed(4)
    weight, scales = torch.randint(-127, 128, (33, 20), generator=g).to(torch.int8), torch.rand(33, generator=g) * 0.01
    packed = linear_int8.pack(weight, scales, None)
    for rows in (1, 7, 100):
        x = torch.randn(rows, 20, generator=g)
        y = linear_int8.apply(x, 1.0, 0, packed, None, "relu", (), 1.0, 0, 0, 0, None)
        wanted = lowered.linear_int8.default if hasattr(lowered.linear_int8, "default") else lowered.linear_int8
        ref = wanted(x, 1.0, 0, weight, scales, None, None, "relu", [], 1.0, 0, 0, 0, None, None, None)
        torch.testing.assert_close(y, ref, atol=2e-3, rtol=1e-3)


def test_inputs_of_any_strides() -> None:
    g = torch.Generator().manual_seed(5)
    wide = torch.randint(0, 256, (6, 80), dtype=torch.uint8, generator=g)
    weight = torch.randint(-127, 128, (19, 40), generator=g).to(torch.int8)
    packed = linear_int8.pack(weight, torch.tensor([0.01]), None)

    def apply(x: Tensor) -> Tensor:
        return linear_int8.apply(x, 0.1, 3, packed, None, "none", (), 1.0, 0, 0, 0, None)

    for x in (wide[:, ::2], wide[:, 40:], wide.t()[:40, :].t(), wide[:1, :40].expand(6, 40)):
        assert torch.equal(apply(x), apply(x.contiguous()))


def test_a_convolution_serves_every_size_and_layout() -> None:
    g = torch.Generator().manual_seed(6)
    weight = torch.randint(-127, 128, (20, 3, 3, 3), generator=g).to(torch.int8)
    conv = conv2d_int8.Convolution(
        conv2d_int8.pack(weight, torch.full((20,), 0.01), torch.randn(20, generator=g)), 0.02, 7, (2, 1), (1, 1), 1.0, 0, "none", (),
        1.0, 0, 0, 0, None, False,
    )  # fmt: skip
    for n, h, w in ((1, 5, 6), (2, 9, 3), (1, 5, 6), (1, 2, 130), (0, 4, 4)):
        x = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=g)
        wanted = torch.nn.functional.conv2d((x.double() - 7) * 0.02, weight.double() * 0.01, conv.packed.bias[:20].double(), (2, 1), (1, 1))
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            got = conv(laid_out)
            assert got.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-5)


def test_the_last_pixel_of_a_picture_reads_nothing_behind_it() -> None:
    """The last line of three-channel pictures ends where a page may end: only its own bytes count."""
    x = torch.arange(2 * 2 * 3, dtype=torch.uint8).reshape(1, 2, 2, 3).permute(0, 3, 1, 2)
    weight = torch.ones(1, 3, 1, 1, dtype=torch.int8)
    y = conv2d_int8.run(x, 1.0, 0, weight, torch.ones(1), None, (1, 1), (0, 0), (1, 1), 1, None, 1.0, 0, "none", (), 1.0, 0, 0, 0, None)
    assert y.flatten().tolist() == [3.0, 12.0, 21.0, 30.0]
