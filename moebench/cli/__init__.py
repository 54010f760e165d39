"""The command line: one file per command; heavy imports are inside the commands."""

import typer

from moebench import __version__
from moebench.cli import (
    adapt,
    bench,
    calibrate,
    compare,
    curve,
    ensemble,
    evaluate,
    export,
    listing,
    plan,
    prepare,
    probe,
    report,
    rm,
    run,
    scaling,
    show,
    sync,
    ui,
    verify,
    watch,
)
from moebench.cli.environment import warn_of_unknown_variables

app = typer.Typer(
    help="Which router? Trains the same sparse-expert model with different routing algorithms, under matched"
    " conditions, and reports which is better, by how much, with what confidence.",
    epilog="Start with: moebench run quickstart, then moebench compare quickstart, then moebench ui.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("curve")(curve.curve)
app.command("ensemble")(ensemble.ensemble)
app.command("scaling")(scaling.scaling)
app.command("plan")(plan.plan)
app.command("prepare")(prepare.prepare)
app.command("list")(listing.list_)
app.command("show")(show.show)
app.command("evaluate")(evaluate.evaluate)
app.command("probe")(probe.probe)
app.command("export")(export.export)
app.command("adapt")(adapt.adapt)
app.command("watch")(watch.watch)
app.command("ui")(ui.ui)
app.command("sync")(sync.sync)
app.command("verify")(verify.verify)
app.command("rm")(rm.rm)
app.add_typer(bench.app, name="bench")
app.add_typer(calibrate.app, name="calibrate")


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"moebench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    warn_of_unknown_variables()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
