"""A door to the kernel benchmark, which ships as ``graphwright.microbench``."""

from __future__ import annotations

import sys

from graphwright.microbench import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m bench.kernels"))
