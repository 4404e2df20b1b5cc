"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results only, no progress.")]
Saved = Annotated[Path, typer.Argument(metavar="FILE.gw", help="A saved result.", show_default=False)]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPEC",
        help="Example inputs: shapes such as 8x3x224x224, 8x128:int64 or mask=8x128:int64 (repeat the option for "
        "several inputs), or file.py:name. Not needed when the factory returns (model, inputs).",
        show_default=False,
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py:FACTORY",
        help="A function that returns a model, or (model, example_inputs); or a model. package.module:name works too.",
        show_default=False,
    ),
]
Recipe = Annotated[str, typer.Option(metavar="NAME", help="A recipe or pass; `graphwright passes` lists them.")]
Calibrate = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:LOADER", help="An iterable of inputs, or a function that returns one.", show_default=False
    ),
]
Against = Annotated[
    str | None,
    typer.Option(metavar="FILE.py:FACTORY", help="The original model, to compare with.", show_default=False),
]
