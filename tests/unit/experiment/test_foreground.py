"""Which cell `run --foreground` selects."""

import pytest

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.experiment.foreground import select_cell
from moebench.runs.cell import Cell


def make_cell(cell_id: str, arm: str, seed: int) -> Cell:
    return Cell(id=cell_id, arm=arm, seed=seed, config=resolve({}), varies={}, plugins=(), data_digest="d")


CELLS = [
    make_cell("ab01", "dense", 3),
    make_cell("ab02", "top_k, steps=5", 3),
    make_cell("cd03", "dense", 4),
    make_cell("dense9", "top_k, steps=5", 4),
]


@pytest.mark.parametrize(
    ("name", "cell_id"),
    [
        ("dense", "ab01"),  # the first seed; a label comes before the start of an id
        ("dense/4", "cd03"),
        ("top_k, steps=5", "ab02"),
        ("top_k, steps=5/4", "dense9"),
        ("c", "cd03"),
        ("ab02", "ab02"),
        ("dense9", "dense9"),
    ],
)
def test_a_cell_is_selected_by_arm_seed_or_id(name: str, cell_id: str) -> None:
    assert select_cell(CELLS, name).id == cell_id


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ab", "--foreground: 'ab' matches several ids: ab01, ab02"),
        ("dnse", "--foreground: there is no cell 'dnse'. Did you mean 'dense'?"),
        ("dense/5", "--foreground: there is no cell 'dense/5'. Did you mean 'dense/"),
        ("", "--foreground: there is no cell ''. Allowed: ARM, ARM/SEED or the start of an id; arms: dense, top_k"),
    ],
)
def test_an_unknown_cell_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_cell(CELLS, name)
    assert str(caught.value).startswith(message)
