"""What `moebench run` prints at its end, and its exit code."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moebench.cli.options import CommandArguments

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from moebench.experiment.run_setup import RunOptions
    from moebench.experiment.runner import RunReport
    from moebench.launch.scheduler import Outcome

EXIT_FAILED, EXIT_TRACKER = 1, 3
MAX_COMMAND_LENGTH = 300
"""Characters of a recommended command; a longer one, with many plug-ins or changes, is named without its arguments."""


def choose_exit_code(report: "RunReport") -> int:
    """Return the exit code of `moebench run`."""
    if report.interrupted:
        return 128 + report.interrupted
    if report.failed or (report.tuning and report.tuning.state.failed):
        return EXIT_FAILED
    return EXIT_TRACKER if report.tracker_problem else 0


def describe_failure(outcome: "Outcome") -> str:
    """Return the line for a cell that failed, with its stage where it is of an experiment with stages."""
    cell = outcome.cell
    stage = f" of stage {cell.stage}" if cell.stage else ""
    return f"failed: {cell.arm} seed {cell.seed}{stage}: {outcome.error}{_count_attempts(outcome)}"


def _count_attempts(outcome: "Outcome") -> str:
    return f", the last of {outcome.attempts} attempts" if outcome.attempts > 1 else ""


def _name_log(log: "Path") -> str:
    """Return where the log of a failed cell is; nothing for one that could not start."""
    return f" (log: {log})" if log.exists() else ""


def print_summary(
    report: "RunReport",
    arguments: CommandArguments,
    options: "RunOptions",
    *,
    lines: Sequence[str],
    given: Sequence[str],
    console: "Console",
) -> None:
    """Print what was done, and the command that continues from there; `lines` come first.

    `given`: options of the command besides those of `options`.
    """
    from moebench.tracking.address import redact_uri
    from moebench.tracking.tracker import format_tracker_problem

    lines = [
        *lines,
        f"{report.num_done} of {report.num_cells} cells done, {len(report.trained)} of them trained now",
    ]
    lines += report.stages.list_lines() if report.stages else []
    lines += report.tuning.list_lines() if report.tuning else []
    lines += [f"{describe_failure(outcome)}{_name_log(report.log_path(outcome))}" for outcome in report.failed]
    lines += [f"warning: {problem}" for problem in report.problems]
    lines += [f"warning: {report.below_trivial}"] if report.below_trivial else []
    lines += [format_tracker_problem(report.tracker_problem)] if report.tracker_problem else []
    if report.interrupted:
        tracker = options.tracker or ""
        given = [*given, *(["--tracker", tracker] if tracker and redact_uri(tracker) == tracker else [])]
        given += ["--jobs", str(options.jobs)] if options.jobs else []
        given += ["--reshard"] if options.reshard else []
        command = arguments.format("run", *given)
        is_long = len(command) > MAX_COMMAND_LENGTH
        lines.append(f"interrupted; continue with: {'the same command' if is_long else command}")
    elif report.num_done:
        compare = arguments.format("compare")
        if len(compare) > MAX_COMMAND_LENGTH:
            compare = "`moebench compare` with the same arguments"
        lines.append(f"next: {'  |  '.join(filter(None, [compare, arguments.format_ui(options.tracker)]))}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
