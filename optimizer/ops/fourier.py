"""ATen rows: Fourier transforms."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphwright.ops.reduce import kept_whole
from graphwright.ops.registry import op


def _flops(args: Any, out: Any) -> Any:
    x = args["self"]
    return 5 * x.numel() * math.ceil(math.log2(max(int(x.shape[args.get("dim", -1)]), 2)))


def _axes(**args: Any) -> str | None:
    left, right = kept_whole(args["self"].ndim, args["dim"]).split(" -> ")
    dim = args["dim"] % args["self"].ndim
    return f"{left} -> {right.replace(f'a{dim}', f'f{dim}')}"


def _sized(x: Tensor, n: Any, dim: int) -> Tensor:
    """x cut or filled with zeros at the end of an axis, which goes last."""
    x = x.movedim(dim, -1)
    return x if n is None else F.pad(x, [0, n - x.shape[-1]])


def _scale(n: Any, norm: str | None, inverse: bool) -> float:
    by = {"ortho": 1 / math.sqrt(n), "forward": 1 if inverse else 1 / n, "backward": 1 / n if inverse else 1}
    return by[norm or "backward"]


def _dft(x: Tensor, count: Any, inverse: bool, norm: str | None) -> Tensor:
    """The first ``count`` terms of the discrete Fourier transform along the last axis, by its definition."""
    n = x.shape[-1]
    work = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
    at = torch.arange(n, device=x.device)
    turns = torch.outer(at, torch.arange(count, device=x.device)) % n
    angle = turns.to(torch.float64) * (2 * math.pi / n) * (1 if inverse else -1)
    matrix = torch.polar(torch.ones_like(angle), angle).to(
        torch.complex128 if work == torch.float64 else torch.complex64
    )
    return torch.matmul(x.to(matrix.dtype), matrix) * _scale(n, norm, inverse)


@op("aten.fft_fft", axes=_axes, flops=_flops)
def fft(self: Tensor, n: Any = None, dim: int = -1, norm: str | None = None) -> Tensor:
    """Discrete Fourier transform along an axis."""
    x = _sized(self, n, dim)
    return _dft(x, x.shape[-1], False, norm).movedim(-1, dim)


@op("aten.fft_ifft", axes=_axes, flops=_flops)
def ifft(self: Tensor, n: Any = None, dim: int = -1, norm: str | None = None) -> Tensor:
    """Inverse discrete Fourier transform along an axis."""
    x = _sized(self, n, dim)
    return _dft(x, x.shape[-1], True, norm).movedim(-1, dim)


@op("aten.fft_rfft", axes=_axes, flops=_flops)
def rfft(self: Tensor, n: Any = None, dim: int = -1, norm: str | None = None) -> Tensor:
    """Discrete Fourier transform of real numbers along an axis: its n // 2 + 1 independent terms."""
    x = _sized(self, n, dim)
    return _dft(x, x.shape[-1] // 2 + 1, False, norm).movedim(-1, dim)


@op("aten.fft_irfft", axes=_axes, flops=_flops)
def irfft(self: Tensor, n: Any = None, dim: int = -1, norm: str | None = None) -> Tensor:
    """The n real numbers whose transform has these terms."""
    n = 2 * (self.shape[dim] - 1) if n is None else n
    half = _sized(self, n // 2 + 1, dim)
    mirror = torch.conj(half[..., 1 : (n + 1) // 2]).flip(-1)
    edge = half[..., :1].real.to(half.dtype)
    middle = half[..., 1:] if n % 2 else torch.cat([half[..., 1:-1], half[..., -1:].real.to(half.dtype)], -1)
    return _dft(torch.cat([edge, middle, mirror], -1), n, True, norm).real.movedim(-1, dim)


def _stft_flops(args: Any, out: Any) -> Any:
    return 5 * out.numel() * math.ceil(math.log2(max(args["n_fft"], 2)))


def _stft(self: Tensor, n_fft: int, hop_length: int | None, win_length: int | None, window: Tensor | None,
          center: bool, pad_mode: str, normalized: bool, onesided: bool | None, return_complex: bool | None,
          align_to_window: bool | None) -> Tensor:  # fmt: skip
    """Short-time Fourier transform: ``[*, t]`` to ``[*, frequencies, frames]``."""
    hop = n_fft // 4 if hop_length is None else hop_length
    length = n_fft if win_length is None else win_length
    x = self if self.ndim == 2 else self.unsqueeze(0)
    if center:
        x = F.pad(x.unsqueeze(1), [n_fft // 2, n_fft // 2], mode=pad_mode).squeeze(1)
    shape = torch.ones(length, dtype=x.dtype, device=x.device) if window is None else window
    left = (n_fft - length) // 2
    frames = x.unfold(-1, n_fft, hop) * F.pad(shape, [left, n_fft - length - left])
    one_side = not x.is_complex() if onesided is None else onesided
    out = _dft(frames, n_fft // 2 + 1 if one_side else n_fft, False, "ortho" if normalized else None).transpose(-2, -1)
    out = out if self.ndim == 2 else out.squeeze(0)
    return out if return_complex else torch.view_as_real(out)


@op("aten.stft", flops=_stft_flops)
def stft(self: Tensor, n_fft: int, hop_length: int | None = None, win_length: int | None = None,
         window: Tensor | None = None, normalized: bool = False, onesided: bool | None = None,
         return_complex: bool | None = None, align_to_window: bool | None = None) -> Tensor:  # fmt: skip
    """Short-time Fourier transform without padding: ``[*, t]`` to ``[*, frequencies, frames]``."""
    return _stft(self, n_fft, hop_length, win_length, window, False, "", normalized, onesided, return_complex, None)


op("aten.stft", flops=_stft_flops, overloads=("center",))(_stft)
