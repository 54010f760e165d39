"""Each cell at work has GPUs of its own, which go back however it ends; the GPUs are faked."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import tiny, write_text

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.runner import default_jobs
from moebench.launch.devices import DevicePool, visible_devices
from moebench.launch.launcher import LocalLauncher
from moebench.launch.scheduler import Outcome, Scheduler
from moebench.runs.cell import Cell

NOTING = """
import json, os, time
from dataclasses import dataclass
from pathlib import Path

from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(Facts(family="token choice", equation="-", paper="-",
        causality=Causality(causal=True, reason="-", batch_dependent=False)))
class Noting(Switch):
    '''Switch that notes which GPUs it may see, and may break.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "noting"
        breaks: bool = False
        '''Whether it raises in its second step.'''

    def forward(self, x_TD, ctx):
        if ctx.training and ctx.step == 1:
            name = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "+")
            Path("HERE", f"{name}-{os.getpid()}").touch()
            if self.config.breaks:
                raise RuntimeError("broke")
        return super().forward(x_TD, ctx)
"""


def fake_gpus(monkeypatch: pytest.MonkeyPatch, number: int, visible: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def noting_in(folder: Path) -> str:
    """Return the text of the plugin that notes what it sees in a folder."""
    (folder / "seen").mkdir()
    return NOTING.replace("HERE", str(folder / "seen"))


def seen_in(folder: Path) -> Counter[str]:
    """Return how many processes saw which GPUs."""
    return Counter(file.name.partition("-")[0] for file in (folder / "seen").iterdir())


@pytest.fixture
def here(tmp_path: Path) -> Path:
    write_text(tmp_path / "text")
    return tmp_path


def cells_of(folder: Path, *overrides: str, plugins: tuple[str, ...] = (), **changes: Any) -> Experiment:
    experiment = tiny(train={"device": "auto"}, **changes)
    experiment["base"]["task"]["data"]["path"] = str(folder / "text")  # the workers do not stand in this folder
    (folder / "tiny.yaml").write_text(json.dumps(experiment))
    return expand(folder / "tiny.yaml", overrides, plugins)


@pytest.mark.parametrize(
    ("number", "visible", "names"),
    [(0, None, ()), (3, None, ("0", "1", "2")), (2, "5, 3", ("5", "3")), (1, "GPU-ab,9", ("GPU-ab",)), (0, "-1", ())],
)
def test_names_are_those_that_the_user_left_visible(
    monkeypatch: pytest.MonkeyPatch, number: int, visible: str | None, names: tuple[str, ...]
) -> None:
    fake_gpus(monkeypatch, number, visible)
    assert visible_devices() == names


def test_the_pool_lends_what_fewest_have() -> None:
    pool = DevicePool(["a", "b", "c", "d"])
    assert pool.lend("one", 1) == ("a",)
    assert pool.lend("three", 2) == ("b", "c")
    assert pool.lend("four", 1) == ("d",)
    pool.take_back("three")
    pool.take_back("three")  # once is enough
    assert pool.lend("five", 1) == ("b",)
    assert pool.lend("six", 2) == ("c", "a")  # more cells than fit: shared, and never one GPU twice in a cell
    assert pool.num_users == {"a": 2, "b": 1, "c": 1, "d": 1}
    for name in ("one", "four", "five", "six", "unknown"):
        pool.take_back(name)
    assert set(pool.num_users.values()) == {0}


@pytest.mark.parametrize(
    ("gpus", "overrides", "jobs"),
    [
        (8, (), 8),
        (8, ("parallel.data=2",), 4),
        (3, ("parallel.data=2",), 1),
        (8, ("train.device=cpu",), 6),  # as on six cores
        (8, ("train.device=cpu", "train.threads=4"), 1),
        (0, ("train.threads=2",), 3),
        (1, ("parallel.data=2",), 1),
    ],
)
def test_default_jobs(
    here: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, overrides: tuple[str, ...], jobs: int
) -> None:
    fake_gpus(monkeypatch, gpus)
    monkeypatch.setattr("moebench.experiment.runner.available_cores", lambda: 6)
    assert default_jobs(cells_of(here, *overrides).cells) == jobs


def test_a_mixed_grid_runs_as_many_cells_as_the_largest_allows(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 8)
    monkeypatch.setattr("moebench.experiment.runner.available_cores", lambda: 3)
    arms = [
        {"label": "gpu"},
        {"label": "two", "parallel": {"data": 2}},
        {"label": "cpu", "router": "hash", "train.device": "cpu"},
    ]
    cells = cells_of(here, grid={"arm": arms}, baseline="gpu").cells
    assert default_jobs(cells) == 3
    assert default_jobs([cell for cell in cells if cell.arm != "cpu"]) == 4
    assert default_jobs([]) == 1


class Watching:
    """A display that sees which GPUs the cells at work have."""

    def __init__(self, launch: LocalLauncher) -> None:
        self.launch = launch
        self.most = Counter[str]()

    def on_start(self, cell: Cell) -> None: ...

    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        for name, number in self.launch.devices.num_users.items():
            self.most[name] = max(self.most[name], number)

    def on_end(self, outcome: Outcome) -> None: ...
    def note(self, text: str) -> None: ...


def test_cells_see_their_own_gpu_alone_and_give_it_back(
    here: Path, monkeypatch: pytest.MonkeyPatch, plugin: Any
) -> None:
    fake_gpus(monkeypatch, 2, "6,7")
    arms = [
        {"label": "breaks", "router": {"name": "noting", "breaks": True}},
        {"label": "well", "router": {"name": "noting"}},
        {"label": "two", "router": {"name": "noting"}, "parallel": {"data": 2}},
        {"label": "on the cpu", "router": {"name": "noting", "jitter": 0.0}, "train.device": "cpu"},
    ]
    plugins = (plugin.write(noting_in(here)),)
    experiment = cells_of(here, plugins=plugins, grid={"arm": arms}, seeds=[0], baseline="well")
    launch = LocalLauncher()
    outcomes = Scheduler(here / "results", "tiny", 1, Watching(launch), launch).run(experiment.cells)
    ends = {outcome.cell.arm: outcome.status for outcome in outcomes}
    assert ends == {"breaks": "failed", "well": "done", "two": "done", "on the cpu": "done"}
    assert launch.devices.num_users == {"6": 0, "7": 0}
    # One after the other: a cell of one process gets the first; those of two see both, by their local rank; what the
    # user wants on the CPU is given none, and sees what the fork server was started with (all, if by another test).
    seen = seen_in(here)
    assert seen["6"] == 2
    assert (seen["6+7"], seen["all"]) in ((3, 0), (2, 1))


def test_cells_at_the_same_time_have_different_gpus(here: Path, monkeypatch: pytest.MonkeyPatch, plugin: Any) -> None:
    fake_gpus(monkeypatch, 2)
    plugins = (plugin.write(noting_in(here)),)
    cells = cells_of(here, plugins=plugins, grid={"router": ["noting"]}, seeds=[0, 1, 2], baseline="noting").cells
    launch = LocalLauncher()
    display = Watching(launch)
    outcomes = Scheduler(here / "results", "tiny", default_jobs(cells), display, launch).run(cells)
    assert [outcome.status for outcome in outcomes] == ["done"] * 3
    assert display.most == {"0": 1, "1": 1}
    seen = seen_in(here)
    assert set(seen) == {"0", "1"}
    assert seen.total() == 3


def test_gpus_go_back_when_a_cell_cannot_even_be_started(
    here: Path, monkeypatch: pytest.MonkeyPatch, plugin: Any
) -> None:
    fake_gpus(monkeypatch, 1)

    def no_process(*arguments: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("moebench.launch.launcher.NearMember", no_process)
    launch = LocalLauncher()
    cells = cells_of(here, seeds=[0]).cells
    outcomes = Scheduler(here / "results", "tiny", 1, Watching(launch), launch).run(cells)
    assert [outcome.status for outcome in outcomes] == ["failed"] * len(cells)
    assert launch.devices.num_users == {"0": 0}


def test_more_processes_than_gpus_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 3)
    with pytest.raises(UsageError, match=r"4 processes on this node and 3 GPU\(s\)"):
        LocalLauncher().check(cells_of(here, "parallel.data=4", "train.batch_size=4").cells)
    LocalLauncher().check(cells_of(here, "parallel.data=4", "train.batch_size=4", "train.device=cpu").cells)
