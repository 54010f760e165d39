"""JSON files with a checksum over their content, and types that are checked when they are read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import read_plain_file

CHECKSUM = "checksum"
"""Key of the SHA-256 (hex) of everything else; missing in files of versions that did not write one."""
Types = type | tuple[type, ...]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise UsageError naming the file if it is missing or damaged."""
    try:
        content = json.loads(read_plain_file(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({_describe(error)})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def add_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON-ready values with their checksum."""
    plain: dict[str, Any] = json.loads(json.dumps({key: value for key, value in values.items() if key != CHECKSUM}))
    return plain | {CHECKSUM: _compute_checksum(plain)}


def pop_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without their checksum; raise ValueError if they are not those that it was computed from."""
    rest = {key: value for key, value in values.items() if key != CHECKSUM}
    if CHECKSUM in values and values[CHECKSUM] != _compute_checksum(rest):
        raise ValueError("its content does not match its checksum")
    return rest


def require_types(values: Mapping[str, Any], types: Mapping[str, Types], optional: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless the values have the keys of `types`, with values of these types."""
    for key, allowed in types.items():
        if key not in values and key not in optional:
            raise ValueError(f"'{key}' is missing")
        value = values.get(key)
        is_wrong_bool = isinstance(value, bool) and allowed is not bool
        if key in values and (is_wrong_bool or not isinstance(value, allowed)):
            raise ValueError(f"'{key}' is {str(value)[:40]!r}, expected {_name(allowed)}")


def require_numbers(values: Mapping[str, Any], key: str) -> None:
    """Raise ValueError unless the value at `key` is a mapping of names to numbers."""
    for name, number in values[key].items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"'{key}' has {str(number)[:40]!r} at '{name}', expected a number")


def _compute_checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _name(allowed: Types) -> str:
    names = {"dict": "an object", "str": "a text", "int": "an integer", "list": "a list", "float": "a number"}
    kinds = allowed if isinstance(allowed, tuple) else (allowed,)
    return " or ".join(names.get(kind.__name__, "null") for kind in kinds)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return " ".join(str(error).split())[:200]
