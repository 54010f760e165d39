"""Find experiment files, by path or by name, and named sizes: in a folder here and among the packaged ones."""

from dataclasses import dataclass
from pathlib import Path

import moebench
from moebench.errors import UsageError, build_unknown_error, suggest

LOCAL = Path("experiments")
PACKAGED = Path(moebench.__file__).parent / "experiments"
LOCAL_SIZES = Path("sizes")
PACKAGED_SIZES = Path(moebench.__file__).parent / "sizes"


@dataclass(frozen=True, kw_only=True)
class ExperimentFile:
    """An experiment that is known by its name."""

    file: Path
    origin: str
    """`packaged`, `local`, or `local, replaces the packaged one`."""


def list_experiments() -> dict[str, ExperimentFile]:
    """Return the experiments by name; a local file takes the place of a packaged one of the same name."""
    packaged, local = ({file.stem: file for file in _list_files(folder)} for folder in (PACKAGED, LOCAL))
    experiments = {name: ExperimentFile(file=file, origin="packaged") for name, file in packaged.items()}
    for name, file in local.items():
        origin = "local, replaces the packaged one" if name in packaged else "local"
        experiments[name] = ExperimentFile(file=file, origin=origin)
    return dict(sorted(experiments.items()))


def _list_files(folder: Path) -> list[Path]:
    """Return the YAML files of a folder; a pipe or a device among them would be read without an end."""
    return [file for file in folder.glob("*.yaml") if file.is_file()]


def find_experiment(name: str) -> Path:
    """Return the file of an experiment given by path or name; raise UsageError if there is none.

    `experiments/NAME.yaml` names a packaged experiment if there is no such file.
    """
    path, experiments = Path(name), list_experiments()
    if path.suffix not in (".yaml", ".yml") and "/" not in name:
        if name not in experiments:
            raise build_unknown_error("experiment", name, experiments)
        return experiments[name].file
    if path.is_file():
        return path
    if path.parent == LOCAL and path.suffix == ".yaml" and path.stem in experiments:
        return experiments[path.stem].file
    raise UsageError(f"{name}: no such experiment file.{suggest(path.stem, experiments)}")


def list_sizes() -> dict[str, Path]:
    """Return the file of each size; one in the folder `sizes` here takes the place of a packaged one."""
    files = {file.stem: file for folder in (PACKAGED_SIZES, LOCAL_SIZES) for file in _list_files(folder)}
    return dict(sorted(files.items(), key=lambda item: (item[0].startswith("S"), item[0])))
