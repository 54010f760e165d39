"""`moebench bench`: speed of the layer, the routers and the training step, against a dense twin and other libraries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moebench.cli.options import (
    DEFAULT_RESULTS,
    Json,
    Plugins,
    Results,
    check_plot,
    complete_experiment,
    complete_router,
)
from moebench.cli.output import print_report
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment

app = typer.Typer(
    help="Measure speed: variants interleaved in one process, ratios to a dense twin, busy rounds discarded.",
    no_args_is_help=False,
    invoke_without_command=True,
)

Rounds = Annotated[int, typer.Option(min=1, help="Valid rounds to measure.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights and inputs.")]
Allocator = Annotated[
    str,
    typer.Option(
        help="keep: glibc keeps all freed memory; training: blocks up to 32 MB, as in training; default: none."
    ),
]
Plot = Annotated[Path | None, typer.Option(help="Write a figure to this PNG, PDF or SVG file.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")]


@app.callback()
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("layer")
def layer(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="T,d,hidden,E,k,activation", help="A custom shape; hidden is the width of one expert."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="One preset, or gpu for the large ones. Repeatable.")
    ] = None,
    load: Annotated[
        list[str] | None,
        typer.Option(metavar="LOAD", help="Expert load: balanced, router or zipf. Default: that of each preset."),
    ] = None,
    rounds: Rounds = 7,
    threads: Threads = None,
    device: Device = "auto",
    seed: Seed = 0,
    allocator: Allocator = "keep",
    plot: Plot = None,
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Time one expert layer against a dense layer of equal FLOPs and against the libraries that are installed.

    All get the same weights and the same inputs, crafted so that every gate makes the same load. Presets are
    fp32 on a CPU, bf16 on CUDA. A round in which other processes used more than 8 % of the machine is discarded.
    """
    check_plot(plot)
    from moebench.bench.layer.measure import Settings, measure
    from moebench.bench.layer.report import build_report

    settings = Settings(
        shapes=shape or (),
        only=only or (),
        loads=load or (),
        rounds=rounds,
        threads=threads,
        device=device,
        seed=seed,
        allocator=allocator,
    )
    bench = measure(settings, print_progress)
    if plot:
        from moebench.bench.layer.figure import draw_figure

        draw_figure(bench, plot)
    print_report(build_report(bench), json=json, markdown=markdown)


@app.command("router")
def router(
    router: Annotated[
        list[str] | None,
        typer.Option("--router", help="A router to time. Repeatable. Default: all.", autocompletion=complete_router),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of tokens. Repeatable. Default: 2048, 8192.")
    ] = None,
    experts: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of experts. Repeatable. Default: 8, 64.")
    ] = None,
    rounds: Rounds = 7,
    threads: Threads = None,
    device: Device = "auto",
    seed: Seed = 0,
    plugin: Plugins = None,
    plot: Plot = None,
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Time every router alone, with its losses, against plain softmax top-k in the same rounds.

    Forward, and forward with backward, in training mode. A router that costs more than it should is named.
    """
    check_plot(plot)
    from moebench.bench.router.measure import Settings, measure
    from moebench.bench.router.report import build_report, draw_figure
    from moebench.registry import load_plugin

    for path in plugin or ():
        load_plugin(path)
    settings = Settings(
        routers=router or (),
        tokens=tokens or (2048, 8192),
        experts=experts or (8, 64),
        rounds=rounds,
        threads=threads,
        device=device,
        seed=seed,
    )
    bench = measure(settings, print_progress)
    if plot:
        draw_figure(bench, plot)
    print_report(build_report(bench), json=json, markdown=markdown)


@app.command("step")
def step(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[EXPERIMENT] [KEY=VALUE]...",
            help="An experiment whose arms are timed, and changes to it. Default: a small language model.",
            autocompletion=complete_experiment,
        ),
    ] = None,
    router: Annotated[
        list[str] | None, typer.Option(help="A router to time besides the dense model. Repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per block.")] = 20,
    rounds: Rounds = 7,
    threads: Threads = None,
    device: Device = "auto",
    allocator: Allocator = "training",
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    plot: Plot = None,
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Time a whole training step: what the trainer adds to a plain loop, and where the time goes.

    Blocks of the real trainer (journal, logging and metrics as configured, no tracker) and of a plain loop with
    the same model, batches, optimizer and clipping take turns; both end at the same weights. Nothing is kept.
    """
    check_plot(plot)
    from moebench.bench.step.measure import Settings, measure
    from moebench.bench.step.report import build_report

    settings = Settings(
        experiment=find_step_experiment(names or (), router or ()),
        routers=router or (),
        overrides=[name for name in names or () if "=" in name],
        plugins=plugin or (),
        results=results,
        steps=steps,
        rounds=rounds,
        threads=threads,
        device=device,
        allocator=allocator,
    )
    bench = measure(settings, print_progress)
    if plot:
        from moebench.bench.step.figure import draw_figure

        draw_figure(bench, plot)
    print_report(build_report(bench), json=json, markdown=markdown)


@app.command("parallel")
def parallel(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of every run.")
    ] = None,
    processes: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of processes. Repeatable. Default: 1, 2, 4.")
    ] = None,
    width: Annotated[
        list[int] | None, typer.Option(min=1, help="Width of an expert. Repeatable. Default: 128, 512.")
    ] = None,
    experts: Annotated[int, typer.Option(min=1, help="Experts in every layer.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Sequences (64 tokens) per step, over all processes.")] = 16,
    steps: Annotated[int, typer.Option(min=12, help="Steps of each run.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Runs on each mesh, in turns.")] = 3,
    device: Device = "auto",
    plot: Plot = None,
    markdown: Markdown = False,
    json: Json = False,
) -> None:
    """Time the same global batch on one process and on every mesh of several.

    Real runs, each in its own processes, that take turns; nothing is kept. On a CPU more processes than cores
    measure the exchange rather than a useful speed.
    """
    check_plot(plot)
    from moebench.bench.parallel.measure import Settings, measure
    from moebench.bench.parallel.report import build_report, draw_figure

    settings = Settings(
        processes=processes or (1, 2, 4),
        widths=width or (128, 512),
        experts=experts,
        batch_size=batch,
        steps=steps,
        rounds=rounds,
        device=device,
        overrides=overrides or (),
    )
    bench = measure(settings, print_progress)
    if plot:
        draw_figure(bench, plot)
    print_report(build_report(bench), json=json, markdown=markdown)


def find_step_experiment(names: Sequence[str], routers: Sequence[str]) -> Path | None:
    """Return the file of the experiment among the arguments, or None; raise UsageError for two subjects."""
    subjects = [name for name in names if "=" not in name]
    if len(subjects) > 1 or (subjects and routers):
        given = ", ".join([*subjects, *(f"--router {name}" for name in routers)])
        raise UsageError(f"bench step: give one experiment, or --router; got {given}")
    return find_experiment(subjects[0]) if subjects else None


def print_progress(text: str) -> None:
    """Print a line of progress on standard error."""
    typer.echo(text, err=True)
