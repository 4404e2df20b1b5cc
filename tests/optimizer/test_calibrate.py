"""Calibration data: what is taken, regrouped, and refused, and running them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphwright.calibrate import Calibration, collect, missing, observe
from graphwright.capture import capture
from graphwright.errors import CalibrationError, InputError
from graphwright.ir import Program, Span


class Masked(nn.Module):
    """A linear, a mask and a table of positions that has no batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor, places: Tensor | None = None) -> Tensor:
        y = self.linear(x) * mask[:, None]
        return y if places is None else y + places


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x.relu() * self.calls


def program(model: nn.Module, *args: Any, dynamic: Any = None, **kwargs: Any) -> Program:
    found = capture(model.eval(), args, kwargs, dynamic=dynamic).program
    assert found is not None
    found.example = tuple(a for a in (*args, *(kwargs[k] for k in sorted(kwargs))) if isinstance(a, Tensor))
    return found


@pytest.fixture(scope="module")
def plain() -> Program:
    return program(nn.Linear(6, 4), torch.randn(3, 6))


@pytest.fixture(scope="module")
def masked() -> Program:
    return program(Masked(), torch.randn(3, 6), mask=torch.ones(3, dtype=torch.int64))


def gather(data: Any, p: Program) -> tuple[tuple[Tensor, ...], ...]:
    return collect(data, p.signature.inputs, p)


def test_forms_of_a_batch(plain: Program, masked: Program) -> None:
    x = torch.randn(3, 6)
    for form in (x, (x,), [x]):
        ((leaf,),) = gather([form], plain)
        assert leaf.equal(x)
    masks = torch.ones(3, dtype=torch.int64)
    both = program(Masked(), torch.randn(3, 6), torch.ones(3, dtype=torch.int64))
    for form in ((x, masks), [x, masks]):  # data loaders collate tuples into lists
        assert [leaf.shape for leaf in gather([form], both)[0]] == [(3, 6), (3,)]
    named = program(Masked(), x=torch.randn(3, 6), mask=masks)
    ((first, second),) = gather([{"x": x, "mask": masks}], named)
    order = {p.name: leaf for p, leaf in zip(named.placeholders, (first, second), strict=True)}
    assert order["x"].equal(x) and order["mask"].equal(masks)


def test_loader_prepare_and_batches(plain: Program) -> None:
    read = []

    def loader() -> Any:
        for k in range(100):
            read.append(k)
            yield torch.full((3, 6), float(k)), "label"

    found = gather(Calibration(loader(), prepare=lambda item: item[0], batches=4), plain)
    assert [float(b[0][0, 0]) for b in found] == [0, 1, 2, 3] and len(read) <= 5
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(9, 6), torch.zeros(9)), batch_size=3)
    assert len(gather(Calibration(data, prepare=lambda item: item[0]), plain)) == 3


def test_an_error_of_the_loader_is_the_users_own(plain: Program) -> None:
    def broken() -> Any:
        yield torch.randn(3, 6)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        gather(broken(), plain)


BAD = {
    "none": (None, "calibration data"),
    "empty": ([], "holds no batch"),
    "tensor": (torch.randn(3, 6), "one Tensor, not a sequence"),
    "dict": ({"x": torch.randn(3, 6)}, "one dict, not a sequence"),
    "number": (7, "one int, not a sequence"),
    "labels": ([(torch.randn(3, 6), torch.zeros(3))], r"calibration batch 0: wrong structure: expected \(tensor\), got"),
    "object": ([torch.randn(3, 6), (object(),)], "calibration batch 1, argument 0.*object"),
    "dtype": ([torch.randn(3, 6), torch.randn(3, 6).double()], r"calibration batch 1, argument 0: expected torch.float32"),
    "nan": ([torch.randn(3, 6), torch.full((3, 6), math.nan)], "calibration batch 1, argument 0: 18 of 18 values are NaN"),
    "infinity": ([torch.randn(3, 6).index_fill(0, torch.tensor(1), math.inf)], "batch 0, argument 0: 6 of 18"),
    "features": ([torch.randn(3, 6), torch.randn(3, 7)], r"batch 1, argument 0: expected shape \(3, 6\), got \(3, 7\)"),
    "rank": ([torch.randn(3, 6, 1)], r"got \(3, 6, 1\)"),
    "no samples": ([torch.randn(0, 6)], r"got \(0, 6\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_say_where(case: str, plain: Program) -> None:
    data, message = BAD[case]
    with pytest.raises(CalibrationError, match=message) as caught:
        gather(data, plain)
    assert caught.value.hint, "the error says what to do next"


def test_structure_hints(plain: Program, masked: Program) -> None:
    with pytest.raises(CalibrationError, match=r"prepare=lambda batch: batch\[0\]"):
        gather([(torch.randn(3, 6), torch.zeros(3))], plain)
    with pytest.raises(CalibrationError, match="mask=tensor.*got"):
        gather([(torch.randn(3, 6),)], masked)


def test_a_used_up_generator(plain: Program) -> None:
    generator = (torch.randn(3, 6) for _ in range(2))
    assert len(gather(generator, plain)) == 2
    with pytest.raises(CalibrationError, match="only once"):
        gather(generator, plain)
    with pytest.raises(CalibrationError, match="reads nothing"):
        gather(Calibration([torch.randn(3, 6)], batches=0), plain)


def test_infinities_of_a_mask_are_meant() -> None:
    mask = torch.zeros(3)
    mask[0] = -math.inf
    p = program(Masked(), torch.randn(3, 6), mask)
    assert len(gather([(torch.randn(3, 6), mask)], p)) == 1
    with pytest.raises(CalibrationError, match="argument 1"):
        gather([(torch.randn(3, 6), mask * math.nan)], p)


@pytest.mark.parametrize("sizes", [[1] * 7, [5, 5], [3, 3, 1], [10], [2]])
def test_samples_are_regrouped_to_the_programs_batch(sizes: list[int], plain: Program) -> None:
    total = sum(sizes)
    rows = torch.arange(total, dtype=torch.float32)[:, None].expand(total, 6)
    found = gather(list(rows.split(sizes)), plain)
    assert len(found) == -(-total // 3) and all(b[0].shape == (3, 6) for b in found)
    order = torch.cat([b[0][:, 0] for b in found])
    assert order[:total].equal(torch.arange(total).float()), "every sample, in order"
    assert order[total:].equal(torch.arange(len(order) - total).float() % total), "filled up from the front"


def test_inputs_without_a_batch_axis_stay_as_they_are() -> None:
    places = torch.randn(1, 4)
    p = program(Masked(), torch.randn(3, 6), torch.ones(3), places)
    found = gather([(torch.randn(5, 6), torch.ones(5), places), (torch.randn(2, 6), torch.ones(2), places)], p)
    assert [[tuple(x.shape) for x in b] for b in found] == [[(3, 6), (3,), (1, 4)]] * 3
    with pytest.raises(CalibrationError, match="expected shape"):  # sizes that disagree with each other
        gather([(torch.randn(5, 6), torch.ones(4), places)], p)
    with pytest.raises(CalibrationError, match="expected shape"):  # whose table would each group get?
        gather([(torch.randn(5, 6), torch.ones(5), places), (torch.randn(5, 6), torch.ones(5), places + 1)], p)


def test_dynamic_sizes_take_any_batch_within_their_span() -> None:
    p = program(nn.Linear(6, 4), torch.randn(3, 5, 6), dynamic="auto")
    assert p.signature.symbols
    found = gather([torch.randn(2, 5, 6), torch.randn(7, 5, 6)], p)
    assert [tuple(b[0].shape) for b in found] == [(2, 5, 6), (7, 5, 6)]
    with pytest.raises(CalibrationError, match=r"got \(2, 5, 7\)"):
        gather([torch.randn(2, 5, 7)], p)
    name = next(iter(p.signature.symbols))
    p.signature.symbols[name] = Span(2, 4)
    assert len(gather([torch.randn(4, 5, 6)], p)) == 1
    with pytest.raises(CalibrationError, match=r"got \(7, 5, 6\)"):
        gather([torch.randn(7, 5, 6)], p)


def test_the_error_for_nothing_given_says_what_to_pass() -> None:
    error = missing("recipe 'int8'")
    assert isinstance(error, InputError) and "recipe 'int8' needs calibration data" in str(error)
    assert "calibration=[batch, ...]" in str(error)


def test_observe_hands_out_values_and_changes_nothing() -> None:
    p = program(Counting(), torch.randn(3, 6))
    relu = next(n for n in p.nodes if "relu" in str(n.target))
    seen: list[Tensor] = []
    batches = [(torch.randn(3, 6),) for _ in range(3)]
    observe(p, batches, {relu: seen.append, p.placeholders[0]: seen.append})
    assert len(seen) == 6 and all(seen[2 * k + 1].equal(b[0].relu()) for k, b in enumerate(batches))
    assert float(p.tensor("calls")) == 0 and not seen[1].requires_grad
