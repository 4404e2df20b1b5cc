"""Linear layers of many rows over a weight that becomes floats piece by piece."""

from __future__ import annotations

import pytest
import torch

from graphwright.kernels import linear_w8, native
from graphwright.kernels.panels import BAND, HIGH, PIECE, WIDE, _beside_threads

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="kernels can't be compiled here")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def layer(rows, width, out, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (out, width), generator=g).to(torch.int8)
    return torch.randn(rows, width, generator=g), weight, torch.rand(out, generator=g) * 0.01 + 0.001, torch.randn(out, generator=g)


def worst(got, x, weight, scales, bias):
    wanted = x.double() @ (weight.double() * scales.double()[:, None]).t() + bias.double()
    return ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()


# rows that fill no tile or more than one band, pieces that end oddly, strips of one, two and three blocks
@pytest.mark.parametrize("rows", [linear_w8.MORE, linear_w8.MORE + 3, HIGH * BAND + 5])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (PIECE, 48), (PIECE + 1, 49), (2 * PIECE - 1, 170), (33, 5)])
def test_sizes_that_fill_nothing_evenly(rows, width, out, threads):
    x, *weight = layer(rows, width, out)
    for n in (1, 3):
        threads(n)
        assert worst(linear_w8.apply(x, linear_w8.pack(*weight), None, "none", ()), x, *weight) < 1e-6


def test_the_number_of_threads_changes_no_bit(threads):
    x, *weight = layer(230, 2 * PIECE + 3, 200)
    packed, found = linear_w8.pack(*weight), []
    for n in (1, 2, 3, 4):
        threads(n)
        found.append(linear_w8.apply(x, packed, None, "none", ()))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_not_finite_stays_in_its_row():
    """Rows lie side by side, and an odd number of inputs is padded: neither may let a NaN or an infinity through to others."""
    x, *weight = layer(101, 35, 40)
    packed = linear_w8.pack(*weight)
    clean = linear_w8.apply(x, packed, None, "none", ())
    x[13], x[100, 0] = float("nan"), float("inf")
    got = linear_w8.apply(x, packed, None, "none", ())
    others = [r for r in range(101) if r not in (13, 100)]
    assert torch.equal(got[others], clean[others])
    assert got[13].isnan().all()
    assert not got[100].isfinite().all()


def test_rows_may_lie_apart():
    x, *weight = layer(101, 20, 37)
    packed = linear_w8.pack(*weight)
    apart = torch.full((101, 64), float("nan"))
    apart[:, :20] = x
    assert torch.equal(linear_w8.apply(apart[:, :20], packed, None, "none", ()), linear_w8.apply(x, packed, None, "none", ()))


@pytest.mark.parametrize(("threads_", "strips", "tiles", "wanted"), [(1, 5, 7, 1), (2, 16, 128, 1), (2, 1, 25, 2), (4, 2, 100, 2), (3, 1, 9, 3), (6, 3, 8, 2)])
def test_threads_share_columns_where_there_are_few(threads_, strips, tiles, wanted):
    assert _beside_threads(threads_, strips, tiles) == wanted


def test_the_tile_fits_the_registers():
    assert HIGH * WIDE + WIDE + 1 <= 32
