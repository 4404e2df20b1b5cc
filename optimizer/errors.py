"""Every exception type of Graphwright. A message says what happened, where, and what to do next."""

from __future__ import annotations


class GraphwrightError(Exception):
    """Base of every error that a user can cause.

    Args:
        what: the fact.
        where: the place: a site, a file and line, or an argument.
        hint: the next step.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        self.what, self.where, self.hint = what, where, hint
        parts = [what if where is None else f"{where}: {what}"]
        if hint:
            parts.append(hint)
        super().__init__("\n  ".join(parts))


class InputError(GraphwrightError, ValueError):
    """An argument or a model input is unusable."""


class RecipeError(InputError):
    """A recipe or pass name does not exist, or its options contradict each other."""


class SiteError(InputError):
    """A site pattern matches nothing."""


class CalibrationError(InputError):
    """Calibration data are missing, empty, of the wrong structure, or not finite."""


class CaptureError(GraphwrightError):
    """A model, or a part of it, could not be captured."""


class CoverageError(InputError):
    """A call lies outside what the optimized model covers, and it cannot be captured anew."""


class PassError(GraphwrightError):
    """A pass broke the program: the message names the pass, its predecessors and the first bad node."""


class CheckError(GraphwrightError, AssertionError):
    """A pass or kernel of one's own does not keep what it promises (``gw.testing``)."""


class UnsupportedError(GraphwrightError):
    """An operation that an optimized model does not offer; the hint says what to do instead."""


class SaveError(GraphwrightError):
    """A result cannot be saved; nothing was written and an older file survives."""


class LoadError(GraphwrightError):
    """A file cannot be loaded: truncated, altered, foreign, or of an unknown version."""


class InternalError(GraphwrightError):
    """An invariant of Graphwright itself is broken; the program's text is attached.

    Args:
        program: text of the program at fault.
    """

    def __init__(self, what: str, *, where: str | None = None, program: str = ""):
        self.program = program
        hint = "This is a defect of Graphwright: please report it with the program below."
        super().__init__(what, where=where, hint=f"{hint}\n{program}" if program else hint)


def nearest(name: str, known: object, n: int = 3) -> str:
    """``"did you mean 'a', 'b'?"`` for the known names closest to ``name``; empty when none is close."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(map(str, known)), n=n, cutoff=0.4)  # type: ignore[call-overload]
    return f"did you mean {', '.join(map(repr, close))}?" if close else ""
