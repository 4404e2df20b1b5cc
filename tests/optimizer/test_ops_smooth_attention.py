"""Attention with an 8-bit first product: how far it is from attention in floats, and what each of its parts is there for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphwright.ops.lowered import attention, attention_int8
from graphwright.ops.smooth_attention import attention_int8_qk

REST: tuple[Any, ...] = (None, None, False, False, 1.0, 0, 0, 0, None)


def _heads(t: int, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, t, 64, generator=g) for _ in range(3))
    return query, key + shift, value


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def test_it_is_closer_than_products_of_integers_throughout() -> None:
    inputs = _heads(200, 0.0)
    wanted = attention(*(x.double() for x in inputs), *REST)
    near, far = (_error(f(*inputs, *REST), wanted) for f in (attention_int8_qk, attention_int8))
    assert near < 0.012 and near < 0.85 * far


def test_what_all_keys_have_in_common_costs_nothing() -> None:
    plain, shifted = _heads(200, 0.0), _heads(200, 30.0)
    wanted = attention(*(x.double() for x in shifted), *REST)
    errors = [_error(attention_int8_qk(*x, *REST), attention(*(t.double() for t in x), *REST)) for x in (plain, shifted)]
    assert errors[1] < 1.5 * errors[0]
    query, key, value = shifted
    step = key.abs().amax() / 127
    assert _error(attention(query, torch.round(key / step) * step, value, *REST), wanted) > 5 * errors[1]


def test_keys_of_other_blocks_do_not_matter_to_a_scale() -> None:
    """One wild key spoils the 64 that it shares a scale with, not the others."""
    query, key, value = _heads(192, 0.0)
    far = torch.zeros(1, 1, 1, 192).masked_fill(torch.arange(192) >= 64, -torch.inf)
    inputs = query, key - key.mean(-2, keepdim=True), value
    quiet = attention_int8_qk(*inputs, far, *REST[1:])
    loud = inputs[1].clone()
    loud[..., 100, :], loud[..., 101, :] = 500.0, -500.0  # the mean stays
    loud[..., 102, :] = inputs[1][..., 100:103, :].sum(-2)
    assert _error(attention_int8_qk(query, loud, value, far, *REST[1:]), quiet.double()) < 1e-3


def test_none_is_left_where_everything_is_masked() -> None:
    query, key, value = _heads(70, 0.0)
    mask = torch.ones(70, 70, dtype=torch.bool)
    mask[5] = False
    y = attention_int8_qk(query, key, value, mask, *REST[1:])
    assert not y[:, :, 5].any() and torch.isfinite(y).all()
    assert attention_int8_qk(query, key[:, :, :0], value[:, :, :0], *REST).shape == query.shape
