"""Each running cell has its own GPUs, which are released however it ends; the GPUs are mocked."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_experiment import tiny, write_text

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.runner import choose_num_jobs
from moebench.launch.devices import DevicePool, visible_devices
from moebench.launch.launcher import LocalLauncher
from moebench.launch.scheduler import Outcome, SchedulePolicy, Scheduler
from moebench.runs.cell import Cell

RECORDING_ROUTER = """
import json, os, time
from dataclasses import dataclass
from pathlib import Path

from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(Facts(family="token choice", equation="-", paper="-",
        causality=Causality(causal=True, reason="-", batch_dependent=False)))
class Recording(Switch):
    '''Switch that records which GPUs are visible, and may raise an error.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "recording"
        fails: bool = False
        '''Whether it raises in its second step.'''

    def forward(self, x_TD, ctx):
        if ctx.training and ctx.step == 1:
            name = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "+")
            Path("HERE", f"{name}-{os.getpid()}").touch()
            if self.config.fails:
                raise RuntimeError("failed")
        return super().forward(x_TD, ctx)
"""


def fake_gpus(monkeypatch: pytest.MonkeyPatch, number: int, visible: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def recording_plugin(folder: Path) -> str:
    """Return the text of the plugin that records the visible GPUs in a folder."""
    (folder / "seen").mkdir()
    return RECORDING_ROUTER.replace("HERE", str(folder / "seen"))


def count_visible_devices(folder: Path) -> Counter[str]:
    """Return how many processes saw which GPUs."""
    return Counter(file.name.partition("-")[0] for file in (folder / "seen").iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path / "text")
    return tmp_path


def cells_of(folder: Path, *overrides: str, plugins: tuple[str, ...] = (), **changes: Any) -> Experiment:
    experiment = tiny(train={"device": "auto"}, **changes)
    experiment["base"]["task"]["data"]["path"] = str(folder / "text")  # workers have another working directory
    (folder / "tiny.yaml").write_text(json.dumps(experiment))
    return expand(folder / "tiny.yaml", overrides, plugins)


@pytest.mark.parametrize(
    ("number", "visible", "names"),
    [(0, None, ()), (3, None, ("0", "1", "2")), (2, "5, 3", ("5", "3")), (1, "GPU-ab,9", ("GPU-ab",)), (0, "-1", ())],
)
def test_visible_devices_have_the_names_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, number: int, visible: str | None, names: tuple[str, ...]
) -> None:
    fake_gpus(monkeypatch, number, visible)
    assert visible_devices() == names


def test_the_pool_assigns_the_least_used_devices() -> None:
    pool = DevicePool(["a", "b", "c", "d"])
    assert pool.acquire("one", 1) == ("a",)
    assert pool.acquire("three", 2) == ("b", "c")
    assert pool.acquire("four", 1) == ("d",)
    pool.release("three")
    pool.release("three")  # once is enough
    assert pool.acquire("five", 1) == ("b",)
    assert pool.acquire("six", 2) == ("c", "a")  # more cells than fit: shared, and never one GPU twice in a cell
    assert pool.num_users == {"a": 2, "b": 1, "c": 1, "d": 1}
    for name in ("one", "four", "five", "six", "unknown"):
        pool.release(name)
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
    folder: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, overrides: tuple[str, ...], jobs: int
) -> None:
    fake_gpus(monkeypatch, gpus)
    monkeypatch.setattr("moebench.experiment.runner.available_cores", lambda: 6)
    assert choose_num_jobs(cells_of(folder, *overrides).cells) == jobs


def test_the_largest_cell_of_a_mixed_grid_limits_the_jobs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 8)
    monkeypatch.setattr("moebench.experiment.runner.available_cores", lambda: 3)
    arms = [
        {"label": "gpu"},
        {"label": "two", "parallel": {"data": 2}},
        {"label": "cpu", "router": "hash", "train.device": "cpu"},
    ]
    cells = cells_of(folder, grid={"arm": arms}, baseline="gpu").cells
    assert choose_num_jobs(cells) == 3
    assert choose_num_jobs([cell for cell in cells if cell.arm != "cpu"]) == 4
    assert choose_num_jobs([]) == 1


class DeviceDisplay:
    """A display that records the most users of each GPU."""

    def __init__(self, launcher: LocalLauncher) -> None:
        self.launcher = launcher
        self.max_users = Counter[str]()

    def on_start(self, cell: Cell) -> None: ...

    def on_progress(self, cell: Cell, message: dict[str, Any]) -> None:
        for name, number in self.launcher.devices.num_users.items():
            self.max_users[name] = max(self.max_users[name], number)

    def on_end(self, outcome: Outcome) -> None: ...
    def note(self, text: str) -> None: ...


@pytest.mark.slow
def test_cells_see_only_their_own_gpu_and_release_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, plugin: Any
) -> None:
    fake_gpus(monkeypatch, 2, "6,7")
    arms = [
        {"label": "fails", "router": {"name": "recording", "fails": True}},
        {"label": "works", "router": {"name": "recording"}},
        {"label": "two", "router": {"name": "recording"}, "parallel": {"data": 2}},
        {"label": "on the cpu", "router": {"name": "recording", "jitter": 0.0}, "train.device": "cpu"},
    ]
    plugins = (plugin.write(recording_plugin(folder)),)
    experiment = cells_of(folder, plugins=plugins, grid={"arm": arms}, seeds=[0], baseline="works")
    launcher = LocalLauncher()
    outcomes = Scheduler(folder / "results", "tiny", SchedulePolicy(), DeviceDisplay(launcher), launcher).run(
        experiment.cells
    )
    ends = {outcome.cell.arm: outcome.status for outcome in outcomes}
    assert ends == {"fails": "failed", "works": "done", "two": "done", "on the cpu": "done"}
    assert launcher.devices.num_users == {"6": 0, "7": 0}
    # One after another: a cell of one process gets the first GPU; one of two processes gets both. A cell on the CPU
    # gets none, and inherits the environment of the fork server (all GPUs, if another test started it).
    counts = count_visible_devices(folder)
    assert counts["6"] == 2
    assert (counts["6+7"], counts["all"]) in ((3, 0), (2, 1))


def test_cells_at_the_same_time_have_different_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch, plugin: Any) -> None:
    fake_gpus(monkeypatch, 2)
    plugins = (plugin.write(recording_plugin(folder)),)
    cells = cells_of(
        folder, plugins=plugins, grid={"router": ["recording"]}, seeds=[0, 1, 2], baseline="recording"
    ).cells
    launcher = LocalLauncher()
    display = DeviceDisplay(launcher)
    policy = SchedulePolicy(jobs=choose_num_jobs(cells))
    outcomes = Scheduler(folder / "results", "tiny", policy, display, launcher).run(cells)
    assert [outcome.status for outcome in outcomes] == ["done"] * 3
    assert display.max_users == {"0": 1, "1": 1}
    counts = count_visible_devices(folder)
    assert set(counts) == {"0", "1"}
    assert counts.total() == 3


def test_gpus_are_released_if_a_cell_cannot_be_started(
    folder: Path, monkeypatch: pytest.MonkeyPatch, plugin: Any
) -> None:
    fake_gpus(monkeypatch, 1)

    def raise_os_error(*arguments: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("moebench.launch.launcher.LocalWorker", raise_os_error)
    launcher = LocalLauncher()
    cells = cells_of(folder, seeds=[0]).cells
    outcomes = Scheduler(folder / "results", "tiny", SchedulePolicy(), DeviceDisplay(launcher), launcher).run(cells)
    assert [outcome.status for outcome in outcomes] == ["failed"] * len(cells)
    assert launcher.devices.num_users == {"0": 0}


def test_more_processes_than_gpus_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, 3)
    with pytest.raises(UsageError, match=r"4 processes on this node and 3 GPU\(s\)"):
        LocalLauncher().check(cells_of(folder, "parallel.data=4", "train.batch_size=4").cells)
    LocalLauncher().check(cells_of(folder, "parallel.data=4", "train.batch_size=4", "train.device=cpu").cells)
