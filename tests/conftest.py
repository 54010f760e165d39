"""Options of the test run: plugin files whose routers the contract tests cover too, and one router alone."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from support.case_selection import Collection, can_select_slow
from support.command_line import FIXTURE_TIMEOUT_S, CommandLine, WarmCommandLine

from moebench.errors import UsageError
from moebench.experts.kernels import gemm_batch, padded_bmm
from moebench.registry import HOMES, PLUGIN_MODULE, get_registry, load_plugin
from moebench.routing.router import ROUTERS

# The same examples in every run, and no time limit for one: a busy machine is not a failure. `make test-all` runs
# the second number of examples by --hypothesis-profile=full, without which the first is used.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=30)
settings.register_profile("full", deadline=None, derandomize=True, max_examples=150)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plugin", action="append", default=[], metavar="PATH", help="cover the routers of this plugin file too"
    )
    parser.addoption("--router", metavar="NAME", help="of the contract tests, run those of this router alone")


def pytest_configure(config: pytest.Config) -> None:
    # Lightning 2.6 on torch 2.13, in its own code; every other warning is an error.
    config.addinivalue_line("filterwarnings", "ignore:.*LeafSpec.* is deprecated:FutureWarning")
    settings.load_profile(config.getoption("--hypothesis-profile") or "quick")
    Collection.with_slow_cases = can_select_slow(config.getoption("-m"))
    torch.set_num_threads(1)  # sums change with the number of threads in the last bit
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported (tests/unit/experts/test_triton_kernels.py)
    try:
        for path in config.getoption("--plugin"):
            load_plugin(path)
        if config.getoption("--router"):
            ROUTERS.get(config.getoption("--router"), where="--router")
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="module")
def kernels_for_few_rows() -> Iterator[None]:
    """Batch and pad products of the few rows of a test, as is done for many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm_batch, "MIN_ROWS", 1)
        patch.setattr(padded_bmm, "MIN_ROWS", dict.fromkeys(padded_bmm.MIN_ROWS, 1e-9))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()  # it would walk over thousands of items again and again
    try:
        return (yield)
    finally:
        gc.enable()
        # Imports and thousands of items: a full collection, which statsmodels asks for in every correction, would walk
        # over all of them.
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--router")
    if not wanted:
        return
    kept, left = [], []
    for item in items:
        in_contract = item.path.is_relative_to(Path(__file__).parent / "contract")
        (kept if not in_contract or routed_by(item) == wanted else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def routed_by(item: pytest.Item) -> str | None:
    """Return the name of the router that a contract test is about, if it is about one."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return given["case"].name if "case" in given else given.get("router")


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator["PluginFolder"]:
    """Write plugin files; what they register is taken back after the test."""
    registries = [get_registry(kind) for kind in HOMES]
    before = [{entry.name: entry for entry in registry.entries()} for registry in registries]  # loads what is built in
    modules = {*sys.modules}
    yield PluginFolder(tmp_path)
    for registry, entries in zip(registries, before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)
    for name in {name for name in sys.modules if name.startswith(PLUGIN_MODULE)} - modules:
        del sys.modules[name]  # so that loading the file again registers its components again


class PluginFolder:
    """Where a test writes its plugin files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, text: str, name: str = "plugin.py") -> str:
        """Write one file and return its path."""
        file = self.folder / name
        file.write_text(text)
        return str(file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that stands for the data set on/hub: `datasets` itself reads it, without a network."""
    import datasets

    folder, load = tmp_path / "hub", datasets.load_dataset
    folder.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *rest, **options: load(str(folder), *rest, **options))
    return folder


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    """A fresh folder with the tiny experiment; nothing that was started outlives the test."""
    command_line = CommandLine(tmp_path)
    command_line.write()
    yield command_line
    command_line.kill_leftovers()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[WarmCommandLine]:
    """Calls without start-up time, which draw figures of what they train in `make test-all` alone."""
    scratch = tmp_path_factory.mktemp("warm")
    command_line = WarmCommandLine(scratch, draws_figures=pytestconfig.getoption("--hypothesis-profile") == "full")
    yield command_line
    command_line.close()


@pytest.fixture(scope="session")
def built_once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], Any]], Path]:
    """Build a folder once for all processes of the test run, whichever comes first, and return it: for reading only."""
    folder_of_process = tmp_path_factory.getbasetemp()
    shared = folder_of_process if worker_id == "master" else folder_of_process.parent

    def folder_of(name: str, build: Callable[[Path], Any]) -> Path:
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                unfinished = shared / f"{name}.unfinished"
                unfinished.mkdir()  # after a failure the next try fails here; the first has the reason
                build(unfinished)
                unfinished.rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def empty_database(built_once: Callable[[str, Callable[[Path], Any]], Path]) -> Path:
    """An empty MLflow database to copy: creating its tables takes a second."""

    def create(folder: Path) -> None:
        from moebench.tracking.address import sqlite_uri
        from moebench.tracking.mlflow_store import MlflowStore

        MlflowStore(sqlite_uri(folder / "mlflow.db"), "unused")

    return built_once("empty_database", create) / "mlflow.db"


@pytest.fixture(scope="session")
def finished(built_once: Callable[[str, Callable[[Path], Any]], Path], warm: WarmCommandLine) -> CommandLine:
    """The tiny experiment with three seeds, trained once: for reading only."""
    return CommandLine(built_once("finished", partial(train_tiny_experiment, warm)))


def train_tiny_experiment(warm: WarmCommandLine, folder: Path) -> None:
    """Train the tiny experiment from the command line, and keep what it printed."""
    command_line = CommandLine(folder)
    command_line.write(seeds=[0, 1, 2])
    try:
        ended = warm.train(command_line, "--json", timeout=FIXTURE_TIMEOUT_S, draws_figures=True)
    finally:
        command_line.kill_leftovers()
    assert ended.code == 0, ended.err
    (folder / "run.json").write_text(ended.out)
    (folder / "run.err").write_text(ended.err)
