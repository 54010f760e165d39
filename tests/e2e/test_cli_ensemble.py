"""`moebench ensemble` on two runs that were trained on one domain each."""

import math

from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results

DOMAINS = "task.data.held_out_domains"


def test_an_ensemble_of_two_runs(cli: CommandLine, warm: WarmCommandLine) -> None:
    cli.write(grid={"router": ["dense"], DOMAINS: [["b"], ["a"]]}, seeds=[0], baseline=None)
    assert warm.train(cli).code == 0
    results = Results(cli.folder / "results")
    runs = [results.folder(f"dense, held_out_domains=['{domain}']", 0).name for domain in "ba"]
    ensemble = warm(cli, "ensemble", *runs, "--json").json
    metrics = ensemble["metrics"]
    assert [run["domains"] for run in ensemble["runs"]] == [["a"], ["b"]]
    for run, domain in zip(runs, "ab", strict=True):
        # As the run itself was measured, and as the run that the label of the domain chooses.
        name = f"bits_per_byte/{domain}"
        trained = results.result(ensemble["runs"]["ab".index(domain)]["arm"], 0)["metrics"][name]
        assert math.isclose(metrics[run][name], trained, rel_tol=1e-5)
        assert math.isclose(metrics["label"][name], trained, rel_tol=1e-5)
        # A mixture is at most ln M nats of a sequence behind the best model, and ahead of no more than both can be.
        best = min(metrics[run][name] for run in runs)
        assert metrics["posterior"][name] <= best + 1 / 32
        assert math.isclose(sum(ensemble["posterior"][domain]), 1)
    table = warm(cli, "ensemble", *runs)
    assert "Mean posterior of each run" in table.out
    for arguments, message in (
        ((runs[0], runs[0]), f"error: ensemble: got the run {runs[0]} alone (allowed: two runs or more)"),
        ((runs[0], "ffff"), "error: "),
    ):
        ended = warm(cli, "ensemble", *arguments)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert ended.err.startswith(message)
