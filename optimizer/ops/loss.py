"""ATen rows: losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphwright.ops.registry import op


def _reduce(loss: Tensor, reduction: int) -> Tensor:
    """0: as it is, 1: mean, 2: sum."""
    return (loss, torch.mean(loss) if reduction == 1 else loss, torch.sum(loss) if reduction == 2 else loss)[reduction]


@op("aten.mse_loss")
def mse_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """Squared differences."""
    return _reduce((self - target) ** 2, reduction)


@op("aten.l1_loss")
def l1_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """Absolute differences."""
    return _reduce(torch.abs(self - target), reduction)


def _huber(self: Tensor, target: Tensor, delta: float) -> Tensor:
    gap = torch.abs(self - target)
    return torch.where(gap < delta, 0.5 * gap * gap, delta * (gap - 0.5 * delta))


@op("aten.smooth_l1_loss")
def smooth_l1_loss(self: Tensor, target: Tensor, reduction: int = 1, beta: float = 1.0) -> Tensor:
    """Squared differences below beta, absolute ones above."""
    return _reduce(_huber(self, target, beta) / beta if beta else torch.abs(self - target), reduction)


@op("aten.huber_loss")
def huber_loss(self: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:
    """Half the squared differences below delta, linear above."""
    return _reduce(_huber(self, target, delta), reduction)


@op("aten.binary_cross_entropy")
def binary_cross_entropy(self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Tensor:
    """Cross entropy of probabilities of two classes; logarithms are at least -100."""
    log, log_rest = (torch.clamp(torch.log(p), min=-100) for p in (self, 1 - self))
    loss = -(target * log + (1 - target) * log_rest)
    return _reduce(loss if weight is None else loss * weight, reduction)


@op("aten.binary_cross_entropy_with_logits")
def binary_cross_entropy_with_logits(
    self: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    """Cross entropy of logits of two classes."""
    zero = torch.zeros_like(self)
    log, log_rest = -torch.logaddexp(zero, -self), -torch.logaddexp(zero, self)
    loss = -((1 if pos_weight is None else pos_weight) * target * log + (1 - target) * log_rest)
    return _reduce(loss if weight is None else loss * weight, reduction)


@op("aten.kl_div")
def kl_div(self: Tensor, target: Tensor, reduction: int = 1, *, log_target: bool = False) -> Tensor:
    """Divergence of the distribution ``exp(self)`` from the target."""
    if log_target:
        return _reduce(torch.exp(target) * (target - self), reduction)
    return _reduce(torch.xlogy(target, target) - target * self, reduction)


def _of_classes(log: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: Any) -> Tensor:
    at = 1 if log.ndim > 1 else 0
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    picked = torch.gather(log, at, index.unsqueeze(at)).squeeze(at)
    weights = (torch.ones_like(picked) if weight is None else weight[index]) * kept
    loss = -picked * weights
    return torch.sum(loss) / torch.sum(weights) if reduction == 1 else _reduce(loss, reduction)


@op("aten.nll_loss_nd")
def nll_loss(
    self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1, ignore_index: Any = -100
) -> Tensor:
    """Negative log likelihood of classes, from their log probabilities on axis 1."""
    return _of_classes(self, target, weight, reduction, ignore_index)


@op("aten.cross_entropy_loss")
def cross_entropy(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: Any = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of logits on axis 1, with classes by index or as probabilities."""
    at = 1 if self.ndim > 1 else 0
    log = torch.log_softmax(self, at)
    if not target.is_floating_point() and not label_smoothing:
        return _of_classes(log, target, weight, reduction, ignore_index)
    if target.is_floating_point():
        count = self.shape[at]
        smooth = target * (1 - label_smoothing) + label_smoothing / count
        shape = [-1 if k == at else 1 for k in range(self.ndim)]
        loss = -torch.sum(log * smooth * (1 if weight is None else weight.reshape(shape)), at)
        return torch.sum(loss) / (self.numel() / count) if reduction == 1 else _reduce(loss, reduction)
    return torch.nn.functional.cross_entropy(
        self,
        target,
        weight,
        ignore_index=int(ignore_index),
        reduction=("none", "mean", "sum")[reduction],
        label_smoothing=label_smoothing,
    )
