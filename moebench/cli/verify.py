"""`moebench verify`: check a whole results folder, and repair what is safe to repair."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Results, print_json
from moebench.errors import UsageError
from moebench.printable import print_text

if TYPE_CHECKING:
    from moebench.experiment.verification import Finding

EXIT_FINDINGS = 1


def verify(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A folder made by `moebench prepare`, in place of the results folder."),
    ] = None,
    results: Results = DEFAULT_RESULTS,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired without losing anything.")] = False,
    tracker: Annotated[
        str | None,
        typer.Option(envvar="MOEBENCH_TRACKER", help="MLflow URI; 'none' for no tracker. Default: SQLite in results."),
    ] = None,
    json: Json = False,
) -> None:
    """Check runs, checkpoints, records, cache and tracker of a results folder, and the machine.

    --fix sends missing points to the tracker, removes duplicate ones, closes runs that are no longer running,
    removes what killed processes left, and restores lost records of experiments. Measured values are never changed.

    Exit codes: 0 clean, 1 findings are left (notes do not count), 2 the folder cannot be read.
    """
    if folder is not None:
        _verify_prepared(folder, json=json)
        return
    from moebench.experiment.machine_check import describe_machine
    from moebench.tracking.address import NO_TRACKER, check_uri

    if tracker not in (None, NO_TRACKER):
        check_uri(tracker)
    findings = _collect(results, tracker)
    fixed, failed = _fix(findings) if fix else ([], [])
    left = _collect(results, tracker) if fixed else findings
    problems = [finding for finding in left if not finding.is_note]
    if json:
        values = {"findings": [finding.to_dict() for finding in left], "machine": describe_machine(results)}
        print_json(values | {"fixed": [finding.to_dict() for finding in fixed], "failed": failed})
    else:
        for finding in fixed:
            print_text(f"fixed    {finding.where}: {finding.problem}: {finding.remedy}")
        for line in failed:
            print_text(f"failed   {line}")
        for finding in left:
            level = "note" if finding.is_note else "fixable" if finding.fix else "problem"
            remedy = f"--fix: {finding.remedy}" if finding.fix else finding.remedy
            print_text(f"{level:<8} {finding.where}: {finding.problem} ({remedy})")
        print_text(f"{len(problems)} problems, {len(left) - len(problems)} notes in {results}")
    if problems:
        raise typer.Exit(EXIT_FINDINGS)


def _verify_prepared(folder: Path, *, json: bool) -> None:
    """Check every checksum of a prepared folder."""
    from moebench.tasks.text.prepared.checks import check_prepared

    problems = list(check_prepared(folder))
    if json:
        print_json({"path": str(folder), "problems": problems})
    else:
        for problem in problems:
            print_text(f"problem  {folder}: {problem} (copy it again, or prepare it again)")
        print_text(f"{len(problems)} problems in {folder}")
    if problems:
        raise typer.Exit(EXIT_FINDINGS)


def _collect(results: Path, tracker: str | None) -> "list[Finding]":
    from moebench.experiment.machine_check import check_machine
    from moebench.experiment.tracker_check import check_tracker
    from moebench.experiment.verification import check_store

    findings = list(check_store(results))
    try:
        findings += check_tracker(results, tracker)
    except UsageError as error:
        from moebench.experiment.verification import Finding

        findings.append(Finding(where="tracker", problem=str(error), remedy="repair the store first"))
    return [*findings, *check_machine(results)]


def _fix(findings: "list[Finding]") -> "tuple[list[Finding], list[str]]":
    """Repair what can be; return what was repaired, and a line for each repair that failed."""
    fixed, failed = [], []
    for finding in findings:
        if finding.fix is None:
            continue
        try:
            finding.fix()
            fixed.append(finding)
        except (OSError, UsageError) as error:
            failed.append(f"{finding.where}: {error}")
    return fixed, failed
