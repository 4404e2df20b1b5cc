"""Which config a call runs under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphwright.errors import InternalError
from graphwright.kernels.gpu.launch import Config, Family


def choose(family: Family, args: Sequence[Any]) -> Config:
    """The config for a call with these arguments."""
    for config in family.configs:
        if family.fits(config, *args) is None:
            return config
    raise InternalError(f"no config of {family.name} fits: {family.fits(family.configs[0], *args)}")
