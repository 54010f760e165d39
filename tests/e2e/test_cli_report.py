"""`moebench report` from the command line."""

from pathlib import Path

from support.command_line import CommandLine, WarmCommandLine
from support.stored_grid import Grid, write_grid


def test_report_writes_a_page_and_tables(cli: CommandLine, warm: WarmCommandLine) -> None:
    write_grid(cli.folder, Grid(arms=3, seeds=3, points=2))
    done = warm(cli, "report", "./stored.yaml", "--tables", "tables", "--json")
    assert (done.code, done.err) == (0, "")
    file = cli.folder / "results" / "experiments" / "stored" / "report.html"
    assert done.json["file"] == str(Path("results/experiments/stored/report.html"))
    assert done.json["bytes"] == file.stat().st_size
    assert "moebench run ./stored.yaml" in file.read_text()
    written = {path.name for path in (cli.folder / "tables").iterdir()}
    assert {"quality.csv", "quality.tex", "how_sure.csv", "by_domain.csv", "provenance.tex"} <= written
    assert len(done.json["tables"]) == len(written)
    assert done.json["tables"][0] == "tables/quality.csv"
    for arguments, message in (
        (["--out", "missing/x.html"], "error: --out missing/x.html: must be a file in a folder that exists"),
        (["--out", "x.pdf"], "error: --out x.pdf: the report is HTML; allowed: a name that ends in .html or .htm"),
        (
            ["--results", "empty"],
            "error: empty: no cell of 'stored' has a result there yet (train it with `moebench run`)",
        ),
    ):
        refused = warm(cli, "report", "./stored.yaml", *arguments)
        assert (refused.code, refused.out, refused.err.strip()) == (2, "", message)
