"""Domains held out of training, from the command line: `run`, what it keeps, and `compare`."""

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results, journal

HELD_OUT = "task.data.held_out_domains=[b]"


def test_a_run_is_measured_out_of_domain(cli: CommandLine, warm: WarmCommandLine) -> None:
    cli.write(grid={"router": ["dense", "top_k", "domain_posterior"]}, seeds=[0])
    ended = warm.train(cli, HELD_OUT)
    assert ended.code == 0, ended.err
    results = Results(cli.folder / "results")
    arms = warm(cli, "compare", "./tiny.yaml", HELD_OUT, "--json").json["arms"]
    for name in ("dense", "top_k", "domain_posterior"):
        metrics = results.result(name, 0)["metrics"]
        outside = metrics["bits_per_byte/out_of_domain"]
        assert metrics["bits_per_byte"] == metrics["bits_per_byte/a"]
        assert metrics["bits_per_byte/b"] == outside != metrics["bits_per_byte"]
        assert arms[name]["bits_per_byte"]["mean"] == metrics["bits_per_byte"]
        assert arms[name]["out_of_domain"].pop("difference") == (
            None
            if name == "dense"
            else {"mean": pytest.approx(outside - arms["dense"]["out_of_domain"]["mean"]), "interval": None}
        )
        assert arms[name]["out_of_domain"] == {"mean": outside, "interval": None, "seeds": {"0": outside}}
        assert arms[name]["domains"] == {"a": metrics["bits_per_byte/a"], "b": outside}
        points = [point["metrics"] for point in journal(results.folder(name, 0))]
        assert [p for p in points if "eval/bits_per_byte/a" in p]
        assert not [p for p in points if "eval/bits_per_byte/b" in p]
        assert ("load/entropy/out_of_domain" in metrics) is (name != "dense")
    table = warm(cli, "compare", "./tiny.yaml", HELD_OUT)
    assert table.code == 0, table.err
    assert "Out of domain: bits per byte, no verdict" in table.out
    assert f"{arms['top_k']['out_of_domain']['mean']:.4f}" in table.out


@pytest.mark.slow
def test_processes_agree_on_what_was_held_out(cli: CommandLine, warm: WarmCommandLine) -> None:
    # Batches of 2 over 2 processes, and a set of 4 + 4 windows of which the last batches are out of domain.
    cli.write(grid={"router": ["top_k"]}, seeds=[0], baseline="top_k")
    metrics_of = []
    for number, mesh in enumerate(([], ["parallel.data=2"], ["parallel.expert=2"])):
        ended = warm.train(cli, HELD_OUT, *mesh, results=f"results{number}")
        assert ended.code == 0, ended.err
        metrics_of.append(Results(cli.folder / f"results{number}").result("top_k", 0)["metrics"])
    assert "load/cv/out_of_domain" in metrics_of[0]
    assert metrics_of[1] == pytest.approx(metrics_of[0], rel=1e-4)
    assert metrics_of[2] == pytest.approx(metrics_of[0], rel=1e-4)


@pytest.mark.parametrize("wrong", ["[a,c]", "[a,b]"])
def test_a_mistake_leaves_no_run(cli: CommandLine, warm: WarmCommandLine, wrong: str) -> None:
    ended = warm(cli, "run", "./tiny.yaml", f"task.data.held_out_domains={wrong}", "--tracker", "none")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert "task.data.held_out_domains" in ended.err
    assert not Results(cli.folder / "results").folders()
