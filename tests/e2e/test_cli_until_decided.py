"""`moebench run --until decided` in real processes, interrupted while it adds seeds and started again."""

import signal

import pytest
from support.command_line import CommandLine, WarmCommandLine, wait_until
from support.results_folder import Results

UNTIL = ("--until", "decided", "--max-seeds", "6")
TRAIN = {"steps": 3, "eval_every": 3, "checkpoint_every": 3}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_run_ends_with_the_same_cells_and_verdicts(cli: CommandLine, warm: WarmCommandLine) -> None:
    # Untrained models with 1e-3 of a margin: nothing is decided, so that both sparse arms get the added seeds.
    cli.write(seeds=[0, 1, 2], train=TRAIN, grid={"router": ["dense", "switch"]})
    complete = warm.train(cli, *UNTIL, "--json", "--jobs", "1", results="whole", timeout=240)
    assert complete.code == 0, complete.err
    until = complete.json["until"]
    assert (until["planned_seeds"], until["max_seeds"]) == (3, 6)
    assert until["added"] == {"dense": [3, 4, 5], "switch": [3, 4, 5]}
    assert len(complete.json["cells"]) == 12
    assert "1 of 1 arms undecided: switch and dense get the seeds 3, 4, 5" in complete.err

    process = cli.start_training(*UNTIL, results="parts")
    parts = Results(cli.folder / "parts")
    wait_until(lambda: len(parts.statuses()) >= 8, "no added cell was trained", 240)
    process.send_signal(signal.SIGINT)
    stopped = cli.wait(process, timeout=60)
    assert stopped.code in (130, 0), stopped.err
    if stopped.code:
        assert "--until decided --max-seeds 6" in stopped.err  # the command that continues
    again = warm.train(cli, *UNTIL, "--json", "--jobs", "1", results="parts", timeout=240)
    assert again.code == 0, again.err
    assert again.json["until"] == until
    assert [cell["id"] for cell in again.json["cells"]] == [cell["id"] for cell in complete.json["cells"]]
    compared = [warm(cli, "compare", "./tiny.yaml", "--json", "--results", name).json for name in ("whole", "parts")]
    qualities = [{arm: row["bits_per_byte"] for arm, row in each["arms"].items()} for each in compared]
    assert qualities[0] == qualities[1]
    assert compared[0]["design"] == compared[1]["design"]
    assert len(qualities[0]["switch"]["seeds"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--until", "decided"), "--until decided: needs --max-seeds too"),
        (("--max-seeds", "8"), "--max-seeds: needs --until decided too"),
        ((*UNTIL, "--dry-run"), "--until: not with --dry-run"),
        ((*UNTIL, "--foreground", "dense"), "--until: not with --foreground"),
        (UNTIL, "seeds must be at least 3 with --until, got [0, 1]"),
        (("--until", "decided", "--max-seeds", "3", "seeds=[0,1,2]"), "--max-seeds must be 4 to"),
    ],
)
def test_mistakes_are_one_line(
    cli: CommandLine, warm: WarmCommandLine, arguments: tuple[str, ...], message: str
) -> None:
    ended = warm.train(cli, *arguments)
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_power_before_and_after_results(finished: CommandLine, warm: WarmCommandLine) -> None:
    before = warm(finished, "plan", "./tiny.yaml", "--power", "--results", "nothing_here", "--json").json["power"]
    assert (before["spread"], before["num_comparisons"]) == (None, 2)
    after = warm(finished, "plan", "./tiny.yaml", "--power", "seeds=[0,1,2]")
    assert after.code == 0, after.err
    assert "SD " in after.out
    assert "from tiny" in after.out
    assert "3 (planned)" in after.out
