"""The kernel benchmark: every kernel checked first, then timed beside its peers; share of what the machine can do.

    graphwright bench kernels [--op linear_int8] [--shapes llama] [--device cuda] [--json FILE] [--csv FILE] [--plot FILE]
    python -m graphwright.microbench ...
"""

from __future__ import annotations

from graphwright.microbench.results import Peer, Result
from graphwright.microbench.run import Plan, bench, main

__all__ = ["Peer", "Plan", "Result", "bench", "main"]
