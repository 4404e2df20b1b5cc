"""The same in Graphwright's kernel language: one pass over memory, on all threads, compiled by LLVM on its first call."""

import torch

import graphwright as gw
from graphwright.kernels.native import Native, threads_for, unavailable
from graphwright.kernels.tile import f32, f64, i64, real, share
from scaled_softsign import kernels


def _softsign(params):  # device code: params holds eight-byte slots, the first two are OpenMP's
    p, d = i64(params), f64(params)
    x, y, scale = f32(p[2]), f32(p[3]), real(d[5])
    first, end = share(params, p[4])
    for i in range(first, end):
        size = x[i] if x[i] > real(0) else -x[i]
        y[i] = scale * x[i] / (real(1) + size)


_NATIVE = Native(_softsign, "qqqd")


@gw.register_kernel("scaled_softsign.softsign", backend="scaled_softsign", name="compiled", samples=kernels.SAMPLES,
                    supports=lambda x, scale: unavailable() or kernels.supports(x, scale))
def compiled(x, scale):
    out = torch.empty_like(x)
    _NATIVE(threads_for(x.numel()), x.data_ptr(), out.data_ptr(), x.numel(), scale)
    return out
