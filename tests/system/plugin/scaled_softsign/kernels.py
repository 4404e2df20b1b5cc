"""A kernel in NumPy: in place in one buffer, where the reference makes three."""

import numpy as np
import torch

import graphwright as gw


def sample(*shape: int, bench: bool = False) -> gw.Sample:
    return gw.Sample("x".join(map(str, shape)), lambda g: (torch.randn(*shape, generator=g), 1.7), bench)


SAMPLES = (sample(64, 1024, bench=True), sample(3, 5, 7), sample(1), sample(0, 4))


def supports(x, scale):
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return f"{x.dtype} on {x.device}; float32 on the CPU is supported"
    return None if x.is_contiguous() else "x is not contiguous"


@gw.register_kernel("scaled_softsign.softsign", backend="scaled_softsign", name="numpy", supports=supports, samples=SAMPLES)
def in_numpy(x, scale):
    out = torch.empty_like(x)
    a, b = x.numpy(), out.numpy()
    np.abs(a, out=b)
    np.add(b, np.float32(1), out=b)
    np.divide(a, b, out=b)
    np.multiply(b, np.float32(scale), out=b)
    return out
