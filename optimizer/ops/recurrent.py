"""ATen rows: recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from graphwright.ops.registry import op

State = tuple[Tensor, ...]
Weights = Sequence[Tensor]


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.matmul(x, weight.transpose(0, 1))
    return y if bias is None else y + bias


def _gates(x: Tensor, h: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """The input's and the state's share of every gate; ``w``: input weight, state weight, perhaps their biases."""
    biased = len(w) > 3
    return _affine(x, w[0], w[2] if biased else None), _affine(h, w[1], w[3] if biased else None)


def _lstm_step(x: Tensor, state: State, w: Weights) -> State:
    projection = w[-1] if len(w) in (3, 5) else None
    a, b = _gates(x, state[0], w)
    i, f, g, o = torch.chunk(a + b, 4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if projection is None else _affine(h, projection, None)), c


def _gru_step(x: Tensor, state: State, w: Weights) -> State:
    a, b = (torch.chunk(v, 3, -1) for v in _gates(x, state[0], w))
    reset, update = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
    new = torch.tanh(a[2] + reset * b[2])
    return ((1 - update) * new + update * state[0],)


def _simple_step(function: Callable[[Tensor], Tensor]) -> Callable[..., State]:
    return lambda x, state, w: (function(sum(_gates(x, state[0], w))),)


def _run(step: Callable[..., State], input: Tensor, hx: State, params: Weights, has_biases: bool, num_layers: int,
         dropout: float, train: bool, bidirectional: bool, batch_first: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """Every layer, direction and time step: ``[t, b, i]`` to ``[t, b, d*h]`` and the last states ``[l*d, b, h]``."""
    x = input.transpose(0, 1) if batch_first else input
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    last: list[State] = []
    for layer in range(num_layers):
        results = []
        for direction in range(directions):
            k = layer * directions + direction
            weights, state = params[k * each : (k + 1) * each], tuple(h[k] for h in hx)
            steps = range(x.shape[0])
            outs = []
            for t in reversed(steps) if direction else steps:
                state = step(x[t], state, weights)
                outs.append(state[0])
            results.append(torch.stack(outs[::-1] if direction else outs))
            last.append(state)
        x = torch.cat(results, -1)
        x = torch.dropout(x, dropout, train) if layer + 1 < num_layers and dropout else x
    states = (torch.stack([s[k] for s in last]) for k in range(len(hx)))
    return (x.transpose(0, 1) if batch_first else x, *states)


def _flops(args: Any, out: Any) -> Any:
    """The products of every step; the gates' own arithmetic is left out."""
    return 2 * prod(args["input"].shape[:-1]) * sum(prod(w.shape) for w in args["params"] if w.ndim == 2)


def _one_state(step: Callable[..., State]) -> Callable[..., Any]:
    return lambda input, hx, *rest: _run(step, input, (hx,), *rest)


@op("aten.lstm", flops=_flops, overloads=("input",))
def lstm(input: Tensor, hx: Sequence[Tensor], params: Weights, has_biases: bool, num_layers: int, dropout: float,
         train: bool, bidirectional: bool, batch_first: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """LSTM: every step's output, the last hidden and the last cell state."""
    return _run(
        _lstm_step, input, tuple(hx), params, has_biases, num_layers, dropout, train, bidirectional, batch_first
    )


for _name, _step, _summary in (
    ("gru", _gru_step, "GRU: every step's output and the last state."),
    ("rnn_tanh", _simple_step(torch.tanh), "Elman RNN with tanh: every step's output and the last state."),
    ("rnn_relu", _simple_step(torch.relu), "Elman RNN with ReLU: every step's output and the last state."),
):
    _body = _one_state(_step)
    _body.__doc__ = _summary
    op(f"aten.{_name}", flops=_flops, overloads=("input",))(_body)


def _cell_flops(args: Any, out: Any) -> Any:
    return 2 * prod(args["input"].shape[:-1]) * (prod(args["w_ih"].shape) + prod(args["w_hh"].shape))


def _cell_weights(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Weights:
    return [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]


@op("aten.lstm_cell", flops=_cell_flops)
def lstm_cell(input: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
              b_hh: Tensor | None = None) -> State:  # fmt: skip
    """One step of an LSTM: hidden and cell state."""
    return _lstm_step(input, tuple(hx), _cell_weights(w_ih, w_hh, b_ih, b_hh))


@op("aten.gru_cell", flops=_cell_flops)
def gru_cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
             b_hh: Tensor | None = None) -> Tensor:  # fmt: skip
    """One step of a GRU."""
    return _gru_step(input, (hx,), _cell_weights(w_ih, w_hh, b_ih, b_hh))[0]
