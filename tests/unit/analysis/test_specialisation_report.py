"""Which expert takes which label: the figure, the rows of the table, and the run that a prefix names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from support.run_folders import write_cell

from moebench.analysis.figures import Figures
from moebench.analysis.specialisation.figures import (
    compute_expert_preference,
    draw_labels,
    find_informative_labels,
    select_layers,
)
from moebench.analysis.specialisation.report import (
    build_label_rows,
    build_label_tables,
    find_best_layer,
    read_label_report,
)
from moebench.errors import UsageError
from moebench.runs.folder import RunFolder
from moebench.training.label_tables import LabelTable, label_tables_to_json

COUNTS = torch.tensor([[6.0, 2.0, 0.0], [1.0, 1.0, 0.0], [1.0, 5.0, 0.0]], dtype=torch.float64)
EVEN = torch.tensor([[4.0, 4.0, 0.0], [1.0, 1.0, 0.0], [3.0, 3.0, 0.0]], dtype=torch.float64)
TABLE = LabelTable(values=("cat", "dog", "cow"), layers={"0": EVEN, "3": COUNTS})


def test_preference_by_hand() -> None:
    # Both experts have half of all; label 0 has 3/4 and 1/4 of them, the third has no token at all.
    preference = compute_expert_preference(COUNTS)
    assert preference[:, :2].tolist() == [[1.5, 0.5], [1, 1], pytest.approx([1 / 3, 5 / 3])]
    assert np.isnan(preference[:, 2]).all()


def test_uninformative_labels_are_left_out() -> None:
    assert find_informative_labels([EVEN, COUNTS]) == [0, 1, 2]
    assert find_informative_labels([COUNTS], num_labels=2) == [0, 2]
    absent = torch.cat([COUNTS, torch.zeros(1, 3)])
    assert find_informative_labels([absent]) == [0, 1, 2]


def test_layers_are_drawn_from_the_first_to_the_last() -> None:
    assert select_layers(["0", "1"]) == ["0", "1"]
    assert select_layers([str(layer) for layer in range(11)]) == ["0", "2", "4", "6", "8", "10"]


def test_rows_by_hand() -> None:
    assert find_best_layer(TABLE) == "3"
    # Label 0: 8 of 16 tokens, 1/2 · (3/4 ln 3/2 + 1/4 ln 1/2) = 0.0654.
    # Label 2: 6 of 16, 3/8 · (1/6 ln 1/3 + 5/6 ln 5/3) = 0.0910.
    assert build_label_rows(TABLE, "3") == [
        ("cat", "50.0 %", "41.8 %", "0: 75 %, 1: 25 %"),
        ("dog", "12.5 %", "0.0 %", "0: 50 %, 1: 50 %"),
        ("cow", "37.5 %", "58.2 %", "1: 83 %, 0: 17 %"),
        ("all", "100.0 %", "100.0 %", "0: 50 %, 1: 50 %"),
    ]


def test_titles_say_that_their_numbers_are_stored_and_not_corrected() -> None:
    first, last = build_label_tables({"class": TABLE, "kind": TABLE}, None)
    assert first.title.startswith("class, I / H(label), not corrected: layer 0 0.0")
    assert not first.notes
    assert "stored by the run, of its whole test split" in last.notes[0]
    assert last.notes[1].startswith("of what is known: ")


def test_the_figure_has_many_labels_layers_and_dead_experts(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    many = {str(layer): torch.rand(40, 8, generator=draw).double() for layer in range(9)}
    few = {layer: torch.eye(2, 8).double() for layer in many}
    tables = {
        "class": LabelTable(values=tuple(f"a class of long name {n}" for n in range(40)), layers=many),
        "sentinel": LabelTable(values=("text", "sentinel"), layers=few),
    }
    path = draw_labels(tables, path=tmp_path / "labels.png", title="switch, seed 0")
    assert path is not None
    assert imread(path)[..., :3].std() > 0.05  # not an empty sheet
    assert draw_labels({}, path=tmp_path / "none.png", title="dense") is None
    assert not (tmp_path / "none.png").exists()


def write_run(results: Path, run_id: str, **fields: object) -> RunFolder:
    folder = RunFolder.of(results, run_id)
    write_cell(folder.path, seed=3, **fields)
    return folder


def test_a_run_is_named_by_how_its_id_begins(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no runs"):
        read_label_report(tmp_path, "aa")
    for run_id in ("aabb", "aacc", "dddd"):
        write_run(tmp_path, run_id).labels.write_text(label_tables_to_json(7, {"class": TABLE}))
    report = read_label_report(tmp_path, "aab")
    assert (report.id, report.arm, report.seed) == ("aabb", "switch", 3)
    table = report.to_dict()["labels"]["class"]
    assert (table["values"], table["layers"]["3"]) == (["cat", "dog", "cow"], COUNTS.tolist())
    assert table["information"] == TABLE.information
    for name, words in (("aa", "matches 2 ids"), ("dddx", "Did you mean 'dddd'"), ("", "unknown")):
        with pytest.raises(UsageError, match=words):
            read_label_report(tmp_path, name)
    with pytest.raises(UsageError, match=r"--label: 'clas' is unknown. Did you mean 'class'"):
        read_label_report(tmp_path, "d", "clas")
    write_run(tmp_path, "eeee")
    with pytest.raises(UsageError, match="is done and has experts"):
        read_label_report(tmp_path, "e")
    write_run(tmp_path, "ffff", config={"router": {"name": "dense"}})
    with pytest.raises(UsageError, match=r"^the router 'dense' of run ffff has no experts to choose from$"):
        read_label_report(tmp_path, "f")


def test_a_run_without_tables_has_the_other_figure(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "aabb")
    folder.loads.write_text(json.dumps({"step": 7, "layers": {"3": [8, 8, 0]}}) + "\n")
    folder.result.write_text("{}")
    Figures().draw_run_figures(folder, "switch")
    assert [path.name for path in folder.path.glob("*.png")] == ["load.png"]
    folder.labels.write_text(label_tables_to_json(7, {"class": TABLE}))
    Figures().draw_run_figures(folder, "switch")
    assert sorted(path.name for path in folder.path.glob("*.png")) == ["labels.png", "load.png"]
