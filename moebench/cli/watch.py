"""`moebench watch`: the layers of a run on the terminal while it trains."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Results, print_json
from moebench.printable import print_text

if TYPE_CHECKING:
    from rich.console import Console

    from moebench.analysis.watching.frame import Screen
    from moebench.analysis.watching.run_history import RunHistory

INTERVAL_S = 1.0
EXIT_INTERRUPTED = 130
MIN_WIDTH = 20


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The id of a run, or a prefix of it (list runs).")],
    results: Results = DEFAULT_RESULTS,
    once: Annotated[bool, typer.Option("--once", help="Print the current state of all layers and exit.")] = False,
    json: Json = False,
) -> None:
    """Show the layers of a run as curves over its logged steps, until it is done or no longer being trained.

    MaxVio: largest load over the mean, minus 1. dead: experts with less than 1 % of an even load. dropped: assignments
    that no expert computed. entropy: entropy of the router, from 0 (certain) to 1. A line marks each collapsed layer.
    In a pipe, one line is printed for each logged step, with the values of the worst layer. Nothing is written; Ctrl-C
    ends only the view.
    """
    from moebench.analysis.watching.run_history import RunHistory
    from moebench.cli.output import make_console
    from moebench.runs.find_run import find_run

    history = RunHistory(find_run(results, run))
    history.update()
    console = make_console()
    if json:
        print_json(_to_dict(history), indent=None)
    elif once:
        _print_frame(history, console)
    else:
        try:
            (_follow_live if console.is_terminal and not console.is_dumb_terminal else _follow_lines)(history, console)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _follow_live(history: "RunHistory", console: "Console") -> None:
    from rich.live import Live
    from rich.text import Text

    from moebench.analysis.watching.frame import build_frame

    def draw() -> Text:
        return Text("\n".join(build_frame(history, _measure_screen(console, is_fitted=True))), no_wrap=True)

    with Live(draw(), console=console, auto_refresh=False, transient=True, screen=False) as live:
        while not history.is_over:
            time.sleep(INTERVAL_S)
            history.update()
            live.update(draw(), refresh=True)
    _print_frame(history, console)


def _follow_lines(history: "RunHistory", console: "Console") -> None:
    from moebench.analysis.watching.frame import build_line, describe_state

    shown = -1
    while True:
        if history.step > shown and history.step:
            shown = history.step
            print_text(build_line(history))
        if history.is_over:
            break
        time.sleep(INTERVAL_S)
        history.update()
    print_text(describe_state(history))


def _print_frame(history: "RunHistory", console: "Console") -> None:
    from moebench.analysis.watching.frame import build_frame

    for line in build_frame(history, _measure_screen(console, is_fitted=False)):
        print_text(line)


def _measure_screen(console: "Console", *, is_fitted: bool) -> "Screen":
    from moebench.analysis.watching.frame import Screen
    from moebench.reporting.sparkline import can_show_blocks

    width, height = console.size
    return Screen(
        width=max(width, MIN_WIDTH),
        height=max(height - 1, 1) if is_fitted else None,
        has_blocks=can_show_blocks(console.encoding),
    )


def _to_dict(history: "RunHistory") -> dict[str, object]:
    from moebench.analysis.watching.frame import describe_state

    layers = {
        name: {quantity: values.values for quantity, values in series.items()}
        for name, series in history.layers.items()
    }
    steps = {name: next(iter(series.values())).steps for name, series in history.layers.items()}
    return {
        "id": history.folder.path.name,
        "arm": history.cell["arm"],
        "seed": history.cell["seed"],
        "state": describe_state(history),
        "steps": steps,
        "layers": layers,
        "loss": {"steps": history.loss.steps, "values": history.loss.values},
        "collapsed": {name: str(collapse) for name, collapse in history.collapses.items()},
    }
