"""The published curves as a file of the user: read, refused when damaged, refitted."""

import csv
import gzip
import io
import os

import numpy as np
import pytest

from moebench.calibration.clark2022 import curves
from moebench.calibration.clark2022.curves import NUMBERS, TEXTS, read_curves, select_points
from moebench.calibration.clark2022.published import PUBLISHED
from moebench.calibration.clark2022.refit import build_report, refit
from moebench.errors import UsageError

SIZES = (15e6, 25e6, 55e6, 130e6, 370e6, 1.3e9)
EXPERTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def make_rows(noise=0.002):
    """Return the runs of a file with the published layout, whose losses follow the published laws."""
    generator = np.random.default_rng(0)
    settings = [("Dense", "S-Base", 1)] + [(name, name, count) for name in PUBLISHED for count in EXPERTS]
    rows = []
    for size in SIZES:
        for router, law, count in settings:
            log_loss = float(PUBLISHED[law].predict_log_loss(size, count)) + generator.normal(0, noise)
            values = {"k": 1, "routing_frequency": 0.5, "flop_increase": 1.0, "seed": 42, "num_experts": count}
            values |= {"hyper_id": len(rows), "router_type": router, "dense_parameter_count": size, "step": 250_000}
            rows.append(values | {"loss_validation": 10**log_loss})
    return rows


def write_csv(path, rows, columns=(*TEXTS, *NUMBERS)):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_the_last_evaluation_of_each_run_counts(tmp_path):
    row = make_rows()[0]
    rows = [row | {"step": step, "loss_validation": loss} for step, loss in ((0, 10.0), (9, 3.0), (5, 4.0), (10, ""))]
    for name in ("curves.csv", "curves.csv.gz"):
        (evaluation,) = read_curves(write_csv(tmp_path / name, rows))
        assert evaluation.numbers["loss_validation"] == 3.0


def test_other_runs_than_those_of_table_3_are_left_out(tmp_path):
    row = make_rows()[0]
    others = [{"k": 2}, {"routing_frequency": 1.0}, {"flop_increase": 2.0}, {"seed": 1}, {"router_type": "RL-R"}]
    rows = [row | {"hyper_id": number} | change for number, change in enumerate([{}, *others])]
    points = select_points(read_curves(write_csv(tmp_path / "curves.csv", rows)), "S-Base")
    assert (len(points), points.num_params_M.tolist()) == (1, [SIZES[0]])


def test_planted_laws_are_inside_the_intervals(tmp_path):
    evaluations = read_curves(write_csv(tmp_path / "curves.csv.gz", make_rows()))
    report = build_report(refit(evaluations, 100, 0))
    assert [router["router"] for router in report.values["routers"]] == ["S-Base", "RL-R", "Hash"]
    rows = {
        (router["router"], row["name"]): row for router in report.values["routers"] for row in router["coefficients"]
    }
    assert len(rows) == 18
    # The dense runs follow the law of S-Base alone, and are a part of every fit.
    assert all(rows["S-Base", name]["contains_published"] for name in ("a", "b", "c", "d", "e_start", "e_max"))
    assert rows["S-Base", "a"]["value"] == pytest.approx(-0.082, abs=0.003)
    assert "| S-Base | a | −0.0820 |" in report.to_markdown()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"loss_validation": "nan"}, "line 2: loss_validation must be a number above 0, got 'nan'"),
        ({"loss_validation": -1}, "loss_validation must be a number above 0"),
        ({"dense_parameter_count": 0}, "dense_parameter_count must be a number above 0"),
        ({"num_experts": "many"}, "num_experts must be a number above 0, got 'many'"),
        ({"step": "inf"}, "step must be a number, got 'inf'"),
        ({"seed": "=1+1" * 1000}, "seed must be a number, got '=1[+]1"),
    ],
)
def test_values_that_no_loss_can_be_are_named(tmp_path, change, text):
    file = write_csv(tmp_path / "curves.csv", [make_rows()[0] | change])
    with pytest.raises(UsageError, match=text) as refused:
        read_curves(file)
    assert len(str(refused.value)) < 400


def test_a_missing_column_is_named(tmp_path):
    file = write_csv(tmp_path / "curves.csv", make_rows(), [column for column in (*TEXTS, *NUMBERS) if column != "k"])
    with pytest.raises(UsageError, match="has no column k; expected data/curves"):
        read_curves(file)


def test_too_few_runs_are_refused(tmp_path):
    evaluations = read_curves(write_csv(tmp_path / "curves.csv", make_rows()[:5]))
    with pytest.raises(UsageError, match="5 runs of S-Base and Dense are those of table 3"):
        refit(evaluations, 100, 0)


def test_damaged_files_are_refused_in_one_line(tmp_path, monkeypatch):
    good = write_csv(tmp_path / "good.csv.gz", make_rows()).read_bytes()
    damaged = {
        "short.csv.gz": good[: len(good) // 2],
        "plain.csv.gz": b"hyper_id,step\n",
        "changed.csv.gz": good[:40] + bytes([good[40] ^ 255]) + good[41:],
        "zeros.csv": b"\0" * 1000,
        "latin.csv": "é".encode("latin-1"),
        "empty.csv": b"",
        "field.csv": b'"' + b"x" * 200_000,
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            read_curves(tmp_path / name)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("folder", "pipe.csv", "nowhere.csv"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_curves(tmp_path / name)
    monkeypatch.setattr(curves, "MAX_BYTES", 2**20)
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"a" * 2**24))
    with pytest.raises(UsageError, match="decompresses to more than 1 MiB"):
        read_curves(tmp_path / "bomb.csv.gz")
