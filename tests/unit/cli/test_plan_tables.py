"""The tables of `moebench plan` at several widths of the terminal."""

from typing import Any

import pytest

from moebench.cli.plan import print_costs, print_overlap, print_training

ARMS = ("dense", "expert_choice (non-causal)", "top_k, train.learning_rate=0.001")
CELL_COLUMNS = ("cell", "arm", "seed", "state", "active", "params", "FLOPs/token", "vs base", "memory")
TRAINING_COLUMNS = ("arm", "train FLOPs", "tokens", "/active", "/params", "text read", "needed", "epochs")


def build_row(arm: str, seed: int) -> dict[str, Any]:
    name, _, mark = arm.partition(" (")
    counts = {"active_params": 148_000, "total_params": 271_000, "flops_per_token": 311_000, "memory_bytes": 599 << 20}
    training = {"train_flops": 6.69e11, "train_tokens": 717_000, "tokens_per_active_param": 4.9}
    read = {"tokens_per_param": 2.6, "read_bytes": 2.35e6, "needed_bytes": 588e3, "epochs": 0.21}
    return {
        "id": f"{ARMS.index(arm)}1524c6e66b{seed}",
        "arm": name,
        "marks": [mark.rstrip(")")] if mark else [],
        "seed": seed,
        "state": "resumable",
        "train_passes": 1,
        "match": "flops",
        "flops_vs_baseline": 0.0123,
        **counts,
        **training,
        **read,
    }


@pytest.mark.parametrize("width", [60, 80, 120])
def test_each_row_is_a_line_of_a_table_that_fits(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [build_row(arm, seed) for seed in (0, 1) for arm in ARMS]
    print_costs(rows)
    print_training(rows)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    assert "state: " not in text, "a line for each value"
    for column in (*CELL_COLUMNS, *TRAINING_COLUMNS):
        assert column in text
    for value in ("148k", "271k", "311k", "+1.23%", "599 MiB"):
        assert text.count(value) == len(rows)
    for value in ("6.69e+11", "717k", "2.35MB", "588kB", "0.21"):
        assert text.count(value) == len(ARMS)
    num_tables = sum("──" in line for line in text.splitlines())
    assert num_tables == {60: 7, 80: 4, 120: 2}[width]


def test_each_part_of_a_table_of_stages_names_stage_and_arm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{**build_row("dense", 0), "stage": stage} for stage in ("train", "adapt")]
    print_costs(rows)
    print_training(rows)
    headers = [line.split() for line in capsys.readouterr().out.splitlines() if " arm " in f"{line} "]
    assert len(headers) > 2, "both tables, one in several parts"
    assert all({"stage", "arm"} <= set(header) for header in headers)


def test_the_overlap_of_each_source_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    overlap = {"removed": 13, "documents": 4583, "removed_by_domain": {"docs-de": 9, "[red]": 4}}
    print_overlap([{"overlap": overlap}, {"overlap": None}, {"overlap": overlap}])
    assert " ".join(capsys.readouterr().out.split()) == (
        "overlap with the training text: 13 of 4,583 validation and test documents removed (docs-de 9, [red] 4)"
    )
