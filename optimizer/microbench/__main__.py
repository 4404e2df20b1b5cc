"""``python -m graphwright.microbench``."""

from __future__ import annotations

import sys

from graphwright.microbench.run import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m graphwright.microbench"))
