"""Task files in a local folder, in lm-eval's YAML form with JSON lines beside them: read without running code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError, suggest
from moebench.file_access import iter_plain_lines, parse_json, read_plain_file
from moebench.yaml_text import parse_typed_yaml

MAX_FILE_BYTES = 1 << 20
MAX_FILES = 1000
MAX_LINE_BYTES = 4 * 2**20
MAX_ROWS = 1_000_000
CODE_KEYS = ("class", "custom_dataset", "use_prompt", "unsafe_code")
"""Keys that name code, or make lm-eval look for code elsewhere."""
FUNCTION_TAG = "!function"
CODE_HINT = "is code (--allow-code, for files that you have read)"


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """One task of a folder."""

    name: str
    path: Path
    config: Mapping[str, Any]
    """In lm-eval's form."""
    rows: Mapping[str, list[dict[str, Any]]] | None
    """Split -> its items, where they are in JSON lines beside the file; None: lm-eval loads them."""


def list_task_files(folder: Path, *, allows_code: bool = False) -> dict[str, TaskFile]:
    """Return the tasks of a folder and the folders in it, by name; files without a task, such as bases, are none.

    `allows_code`: whether `!function` and what else runs code is followed, as lm-eval does. Raises UsageError, which
    names the file, for code without that, damage, a name that is there twice, and files outside the folder.
    """
    if not folder.is_dir():
        raise UsageError(f"--include {folder}: is no folder (allowed: a folder with task files, NAME.yaml)")
    paths = sorted(path for path in folder.rglob("*.yaml") if path.is_file())
    if len(paths) > MAX_FILES:
        raise UsageError(f"--include {folder}: has {len(paths)} YAML files (allowed: {MAX_FILES})")
    tasks: dict[str, TaskFile] = {}
    for path in paths:
        config = _load_with_code(path) if allows_code else _read_config(path, folder, ())
        name = config.get("task")
        if not isinstance(name, str):
            continue
        if name in tasks:
            raise UsageError(f"{path}: the task '{name}' is also in {tasks[name].path}")
        if not allows_code:
            _refuse_code(config, path)
        tasks[name] = TaskFile(name=name, path=path, config=config, rows=_read_rows(config, path, folder))
    if not tasks:
        raise UsageError(f"--include {folder}: has no task files (NAME.yaml with the key task)")
    return tasks


def _read_config(path: Path, folder: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return the settings of a file over those of the files that it includes."""
    if path in seen:
        raise UsageError(f"{path}: includes itself")
    try:
        config = parse_typed_yaml(read_plain_file(path, MAX_FILE_BYTES).decode())
    except (OSError, ValueError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error)[:300]
        if FUNCTION_TAG in reason:
            raise UsageError(f"{path}: {FUNCTION_TAG} {CODE_HINT}") from error
        raise UsageError(f"{path}: cannot be read ({reason})") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise UsageError(f"{path}: holds a {type(config).__name__}; allowed: a mapping of names")
    included = config.pop("include", None) or []
    base: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        base |= _read_config(_find_member(path, folder, name, "include"), folder, (*seen, path))
    return base | config


def _load_with_code(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config: dict[str, Any] = load_yaml(path, resolve_func=True)
    except Exception as error:  # whatever the code of the user raises
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())[:300]})") from error
    return config


def _find_member(path: Path, folder: Path, name: object, key: str) -> Path:
    """Return the file that a task file names, relative to itself; raise UsageError for one outside the folder."""
    member = (path.parent / str(name)).resolve()
    if not member.is_relative_to(folder.resolve()):
        raise UsageError(f"{path}: {key} names '{name}', which is outside {folder}")
    return member


def _refuse_code(config: Mapping[str, Any], path: Path) -> None:
    """Raise UsageError for settings that run code, or look for it in other places."""
    from dataclasses import fields

    import lm_eval.api.metrics  # noqa: F401  # registers the metrics
    from lm_eval.api.registry import metric_registry
    from lm_eval.config.task import TaskConfig

    for key in config:
        if key in CODE_KEYS and config[key]:
            raise UsageError(f"{path}: {key} {CODE_HINT}")
    allowed = [field.name for field in fields(TaskConfig)]
    strange = next((key for key in config if key not in (*allowed, *CODE_KEYS)), None)
    if strange:
        raise UsageError(f"{path}: the key '{strange}' is unknown.{suggest(strange, allowed)}")
    _refuse_other_files(config, path)
    metrics = config.get("metric_list") or []
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        name = metric.get("metric") if isinstance(metric, dict) else None
        if not isinstance(name, str) or name not in metric_registry:
            known = suggest(str(name), list(metric_registry))
            raise UsageError(f"{path}: metric_list has {name!r}, which lm-eval does not have.{known}")
        if metric.get("hf_evaluate"):
            raise UsageError(f"{path}: metric_list has hf_evaluate, which {CODE_HINT}")


def _refuse_other_files(config: Mapping[str, Any], path: Path) -> None:
    """Raise UsageError for data in files that are not JSON lines of the folder."""
    dataset, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if dataset not in (None, "json") and (not isinstance(dataset, str) or Path(dataset).exists()):
        raise UsageError(f"{path}: dataset_path names {dataset!r} (allowed: json, or a name on the hub)")
    named = next((key for key in ("data_files", "data_dir", "cache_dir") if key in options), None)
    if not isinstance(options, dict) or (named and (dataset != "json" or named != "data_files")):
        raise UsageError(f"{path}: dataset_kwargs has {named} (allowed: data_files with dataset_path: json)")


def _read_rows(config: Mapping[str, Any], path: Path, folder: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Return the items of each split from JSON lines in the folder; None where the data are others."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") != "json" or files is None:
        return None
    splits = files if isinstance(files, dict) else {"train": files}
    return {
        str(split): [
            row
            for name in (names if isinstance(names, list) else [names])
            for row in _read_lines(_find_member(path, folder, name, "data_files"))
        ]
        for split, names in splits.items()
    }


def _read_lines(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for number, line in enumerate(iter_plain_lines(file, max_line_bytes=MAX_LINE_BYTES), 1):
            if not line.strip():
                continue
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is a {type(row).__name__}, not an object")
            rows.append(row)
            if len(rows) > MAX_ROWS:
                raise ValueError(f"more than {MAX_ROWS:,} lines")
    except FileNotFoundError as error:
        raise UsageError(f"{file}: does not exist (data_files, relative to the task file)") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{file}: cannot be read as JSON lines ({reason})") from error
    if not rows:
        raise UsageError(f"{file}: has no lines")
    return rows
