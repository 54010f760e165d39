"""The reason of a failure in one line."""

from pathlib import Path

import pytest
import torch

from moebench.compatibility import check_cell
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.launch.error_report import describe_cell_error, describe_error
from moebench.launch.failure import describe_start_error
from moebench.registry import get_registry
from moebench.routing.router import check_top_k
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder


@pytest.mark.parametrize("size", [10**15, 10**18])
def test_a_failed_allocation_is_called_out_of_memory(size: int) -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(size)
    assert describe_error(failure.value).startswith("out of memory: ")
    assert "you tried to allocate" in describe_error(failure.value)


def test_other_errors_of_torch_are_not() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.ones(2) @ torch.ones(3)
    assert describe_error(failure.value).startswith("RuntimeError: ")


@pytest.mark.parametrize(
    ("error", "is_named"),
    [(TypeError("not a tensor"), True), (UsageError("a rule"), False), (OSError(5, "disk"), False)],
)
def test_an_error_in_a_cell_with_plugins_names_them(tmp_path: Path, error: Exception, is_named: bool) -> None:
    folder = RunFolder(tmp_path / "ab01")
    assert describe_cell_error(error, folder) == describe_error(error)  # a folder without a cell
    plugins = ("/my/router.py",)
    cell = Cell(id="ab01", arm="mine", seed=0, config=resolve({}), varies={}, plugins=plugins, data_digest="d")
    folder.write_cell(cell.to_dict("tiny"))
    hint = " (plug-ins of the cell: /my/router.py)" if is_named else ""
    assert describe_cell_error(error, folder) == describe_error(error) + hint


def test_a_start_that_fails_names_the_file_or_the_reason() -> None:
    assert describe_start_error(PermissionError(13, "Permission denied", "/x")) == "cannot write /x: Permission denied"
    assert "temporarily unavailable" in describe_start_error(OSError(11, "Resource temporarily unavailable"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 1, 2), "layout.num_experts must be at least 2 with this router, got 1: router.top_k is at least 2"),
        ((2, 1, 2, "why"), r"layout.num_experts must be at least 2 with this router, got 1 \(why\)"),
        ((2, 1), r"router.top_k=2 does not fit layout.num_experts=1 \(allowed: 1\)"),
        ((9, 8), r"router.top_k=9 does not fit layout.num_experts=8 \(allowed: 1 to 8\)"),
    ],
)
def test_one_expert_is_refused_with_what_is_allowed(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        check_top_k(*arguments)


def test_no_router_refuses_one_expert_with_an_empty_range() -> None:
    refusals = []
    for name in get_registry("router").names():
        try:
            check_cell(resolve({"router": name, "layout": {"num_experts": 1}, "allow_noncausal": True}))
        except UsageError as error:
            refusals.append(f"{name}: {error}")
    assert refusals
    assert [text for text in refusals if "2 to 1" in text or "1 to 1" in text] == []
