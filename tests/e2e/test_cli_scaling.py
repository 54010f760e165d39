"""`moebench scaling` and `moebench calibrate`: what they print, and mistakes in one line."""

import signal

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.scaling_ladder import expand_ladder, write_runs


def test_the_commands_print_laws_and_refuse_in_one_line(cli: CommandLine, warm: WarmCommandLine) -> None:
    experiment = expand_ladder(cli.folder)
    write_runs(experiment, cli.folder / "results")
    ended = warm(cli, "scaling", "./ladder.yaml", "--replicates", "100", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert ended.json["routers"][0]["router"] == "switch"
    shown = warm(cli, "scaling", "./ladder.yaml", "--replicates", "100")
    assert (shown.code, shown.err) == (0, "")
    assert "effective parameters" in shown.out
    for arguments, text in (
        (("scaling", "./ladder.yaml", "model.d_model=16"), "model.d_model"),
        (("scaling", "seeds=[0]"), "give one experiment or more"),
        (("scaling", "ladderr"), "ladderr"),
        (("scaling", "./ladder.yaml", "--results", "nowhere"), "no cell with experts of ladder is done"),
        (("calibrate", "clark", "--data", "nowhere.csv"), "nowhere.csv: cannot be read"),
        (("calibrate", "clark"), "Missing option '--data'"),
        (("calibrate", "chen", "--setting", "S5"), "--setting: 'S5' is unknown"),
        (("calibrate", "chen", "--model", "MoE liner"), "Did you mean 'MoE linear'?"),
        (("calibrate", "clarke"), "No such command 'clarke'"),
    ):
        refused = warm(cli, *arguments)
        assert (refused.code, refused.out) == (2, ""), arguments
        assert text in refused.err, refused.err
        assert refused.err.count("\n") == 1


@pytest.mark.slow
def test_an_interrupted_calibration_prints_what_is_finished(cli: CommandLine) -> None:
    # Linear experts that do not converge: the second run takes longer than the signal.
    process = cli.start("calibrate", "chen", "--setting", "S3", "--model", "MoE linear", "--jobs", "1", "--markdown")
    assert process.stderr is not None
    assert "S3 MoE linear, seed 0:" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    ended = cli.wait(process, timeout=60)
    assert ended.code == 130
    assert "| MoE linear | S3 | 95.93 ± 1.34 |" in ended.out
    assert "Traceback" not in ended.err
