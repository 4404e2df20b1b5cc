"""What the command line writes: progress to stderr, results to stdout; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.markup import escape


class Progress:
    """A `progress=` callable: on a terminal one line that changes, elsewhere plain lines, silent when quiet.

    Use as a context manager around the work; `say(text)` shows the current step and, plainly, the seconds so far.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self.quiet = quiet
        self.console = console or Console(stderr=True)
        self.start = time.monotonic()
        self._last = ""
        self._status = None if quiet or not self.console.is_terminal else self.console.status("")

    def __enter__(self) -> Self:
        self.start = time.monotonic()
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, line: str) -> None:
        if self.quiet:
            return
        stamp = f"{time.monotonic() - self.start:6.1f} s"
        if self._status:
            self._status.update(f"[dim]{stamp}[/dim]  {escape(line)}")
        elif line != self._last:
            print(f"{stamp}  {line}", file=self.console.file, flush=True)
        self._last = line


def out_console() -> Console:
    """The console for results. Away from a terminal it is wide enough that no table line is folded."""
    return Console() if sys.stdout.isatty() else Console(width=160, no_color=True)
