"""A grid that tests interrupt, and its comparison with the same grid trained without interruption."""

import json
from pathlib import Path
from typing import Any

from support.command_line import FIXTURE_TIMEOUT_S, CommandLine, WarmCommandLine
from support.results_folder import Results, deterministic_points, drop_measured, drop_throughput, journal

STEPS, CHECKPOINT_EVERY = 90, 15
ARMS, SEEDS = ["dense", "switch"], [0, 1]
TRAIN = {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "eval_every": 30, "batch_size": 4}
STOP_TIMEOUT_S = 30.0
RESUME = ("run", "./tiny.yaml", "--tracker", "none", "--jobs", "2")


def write_grid(cli: CommandLine, **changes: Any) -> None:
    """Write the experiment."""
    cli.write(**{"train": TRAIN, "grid": {"router": ARMS}, "seeds": SEEDS} | changes)


def train_without_interruption(warm: WarmCommandLine, folder: Path) -> None:
    """Train and compare the grid in a folder."""
    cli = CommandLine(folder)
    write_grid(cli)
    try:
        ended = warm.train(cli, "--jobs", "1", timeout=FIXTURE_TIMEOUT_S)
        assert ended.code == 0, ended.err
        compared = warm(cli, "compare", "./tiny.yaml", "--json")
    finally:
        cli.kill_leftovers()
    assert (compared.code, compared.err) == (0, "")
    (folder / "comparison.json").write_text(compared.out)


def assert_equal_to(reference: CommandLine, cli: CommandLine, warm: WarmCommandLine) -> None:
    """Check metrics, journals, loads and the comparison against the reference, all but the speeds."""
    expected = Results(reference.folder / "results")
    for folder in Results(cli.folder / "results").folders():
        twin = expected.path / "runs" / folder.name
        result, twin_result = (json.loads((path / "result.json").read_text()) for path in (folder, twin))
        assert result["throughput"]["tokens_per_s"] > 0, folder
        assert drop_measured(result) == drop_measured(twin_result)
        assert [p["step"] for p in journal(folder) if "loss/task" in p["metrics"]] == [*range(1, STEPS + 1)]
        assert deterministic_points(folder) == deterministic_points(twin)
        if (twin / "load.jsonl").exists():
            assert read_loads(folder) == read_loads(twin)
            assert (folder / "layers.jsonl").read_text() == (twin / "layers.jsonl").read_text()
    compared = warm(cli, "compare", "./tiny.yaml", "--json")
    assert (compared.code, compared.err) == (0, "")
    original = json.loads((reference.folder / "comparison.json").read_text())
    assert drop_throughput(compared.json) == drop_throughput(original)


def read_loads(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the file of loads."""
    return [json.loads(line) for line in (folder / "load.jsonl").read_text().splitlines()]


def assert_resumed(folder: Path, first_times: dict[int, float]) -> None:
    """Check that the points up to a checkpoint were kept, by their times, and that later ones are new."""
    now = {point["step"]: point["time"] for point in journal(folder) if "loss/task" in point["metrics"]}
    kept = [step for step, time_s in first_times.items() if now.get(step) == time_s]
    assert kept, "no point was kept: the cell started from step 0"
    assert kept == [*range(1, max(kept) + 1)]


def step_times(folder: Path) -> dict[int, float]:
    """Return step -> time of its point in the journal."""
    return {point["step"]: point["time"] for point in journal(folder) if "loss/task" in point["metrics"]}
