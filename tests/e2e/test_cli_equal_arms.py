"""Equal arms in real runs: two that differ in an option without effect, and one arm against itself by other seeds."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.command_line import FIXTURE_TIMEOUT_S, CommandLine

from moebench.analysis.compare.comparison import compare
from moebench.analysis.compare.values import BITS_PER_BYTE
from moebench.runs.folder import list_run_folders
from moebench.runs.result import RunResult

EQUAL = ("undecided", "equivalent")
NUM_SEEDS, GROUP = 20, 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """Train `top_k` for 20 seeds, and for five of them with another coefficient of the balancing loss, too."""
    cli = CommandLine(tmp_path_factory.mktemp("equal"))
    train = {"steps": 60, "batch_size": 4, "eval_every": 60, "checkpoint_every": 60}
    routers = {"a": {"name": "top_k"}, "b": {"name": "top_k", "losses": {"load_balance": 0.0100001}}}
    grids = {
        "pair": ({"arm": [{"label": label, "router": router} for label, router in routers.items()]}, GROUP, "a"),
        "alone": ({"router": ["top_k"]}, NUM_SEEDS, "top_k"),
    }
    for name, (grid, num_seeds, baseline) in grids.items():
        cli.write(f"{name}.yaml", train=dict(train), grid=grid, seeds=list(range(num_seeds)), baseline=baseline)
        ended = cli.wait(cli.start("run", f"./{name}.yaml", "--tracker", "none"), FIXTURE_TIMEOUT_S)
        assert ended.code == 0, ended.err
    return cli


def split_seeds(folder: Path) -> list[RunResult]:
    """Return the runs of one arm as four arms of five seeds each."""
    runs = [run for each in list_run_folders(folder) if (run := each.read_result()) is not None and run.arm != "b"]
    return [
        replace(run, arm=f"group {run.seed // GROUP}", seed=run.seed % GROUP, id=f"{run.id}-{run.seed}")
        for run in sorted(runs, key=lambda run: run.seed)
    ]


@pytest.mark.slow
@pytest.mark.timeout(2 * FIXTURE_TIMEOUT_S)
def test_an_option_without_effect_is_not_called_better_or_worse(trained: CommandLine) -> None:
    ended = trained("compare", "./pair.yaml", "--json")
    assert ended.code == 0, ended.err
    difference = ended.json["arms"]["b"]["difference"]
    assert difference["mean"] != 0
    assert difference["verdict"] in EQUAL
    assert ended.json["margin"]["share_of_baseline"] == 0.01
    narrow = trained("compare", "./pair.yaml", "--json", "--margin", "1e-9").json
    assert narrow["arms"]["b"]["difference"]["verdict"] == "undecided"


@pytest.mark.slow
@pytest.mark.timeout(2 * FIXTURE_TIMEOUT_S)
def test_an_arm_does_not_differ_from_itself_by_other_seeds(trained: CommandLine) -> None:
    results = split_seeds(trained.folder / "results")
    assert len(results) == NUM_SEEDS
    expected = [(run.arm, run.seed, run.id) for run in results]
    for baseline in ("group 0", "group 1", "group 2", "group 3"):
        comparison = compare(results, expected=expected, baseline=baseline, metric=BITS_PER_BYTE)
        assert {pair.verdict for pair in comparison.differences} <= set(EQUAL)
        assert all("best" not in arm.marks for arm in comparison.arms)
