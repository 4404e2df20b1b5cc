"""What is printed, by rich or as plain lines, and told as JSON, in the same words wherever it is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


class Shown:
    """Base of what users print; a subclass gives its ``blocks``, and its plain data as ``to_dict``."""

    def blocks(self, *, full: bool, width: int) -> Iterator[Any]:
        """What rich prints, in order: all of it, or the most telling part; ``width`` in columns."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        raise NotImplementedError

    def text(self, *, full: bool = False, width: int | None = None) -> str:
        """As plain text.

        Args:
            full: everything, not the most telling part.
            width: columns; those of the terminal by default.
        """
        from graphwright.report.text import plain_text

        return plain_text(lambda columns: self.blocks(full=full, width=columns), width)

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield from self.blocks(full=False, width=options.max_width)

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)
