"""What the command line writes: progress to stderr, results to stdout; plain lines where there is no terminal."""

from __future__ import annotations

import re
import sys
import time
from typing import Self

from rich.console import Console
from rich.markup import escape

#: Seconds between plain lines that differ in a counter (`timing kernels 3/40: conv1`) only.
EVERY_S = 3.0
_COUNTER = re.compile(r"\d+( of |/)\d+.*")


class Progress:
    """A `progress=` callable: on a terminal one line that changes, elsewhere plain lines, silent when quiet.

    Use as a context manager around the work; `say(text)` shows the current step and the seconds so far. Plain lines are
    not repeated, and those that count something come now and then.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None):
        self.quiet = quiet
        self.console = console or Console(stderr=True)
        self.start = time.monotonic()
        self._shown, self._shown_at = "", 0.0
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
        now = time.monotonic() - self.start
        if self._status:
            self._status.update(f"[dim]{now:6.1f} s[/dim]  {escape(line)}")
        elif self._tells(line, now):
            print(f"{now:6.1f} s  {line}", file=self.console.file, flush=True)
            self._shown, self._shown_at = line, now

    def _tells(self, line: str, now: float) -> bool:
        same = _COUNTER.sub("", line) == _COUNTER.sub("", self._shown)
        return not same or (line != self._shown and now - self._shown_at >= EVERY_S)


def out_console() -> Console:
    """The console for results. Away from a terminal it is wide enough that no table line is folded."""
    return Console() if sys.stdout.isatty() else Console(width=160, no_color=True)
