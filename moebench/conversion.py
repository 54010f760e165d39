"""Convert untyped values from files and command lines to the types of configuration keys."""

import dataclasses
import keyword
import re
import types
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moebench.errors import UsageError, shorten, suggest
from moebench.ranges import check_undeclared
from moebench.yaml_text import MalformedYaml, PlainScalar

T = TypeVar("T")

Untyped = Annotated[Any, "typed later, by the key of a cell that it is for"]
"""Type of a key whose value is converted later, when the component that it belongs to is known."""

NULL = ("null", "Null", "NULL", "~", "")
TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INTEGER = re.compile(r"(?P<decimal>[-+]?[0-9]{1,3000})|0o(?P<octal>[0-7]{1,3000})|0x(?P<hex>[0-9a-fA-F]{1,3000})")
"""Whole numbers of YAML 1.2's core schema: a leading zero does not make them octal."""
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.?(inf(inity)?|nan)", re.IGNORECASE)
"""Numbers of YAML 1.2's core schema; infinity and nan also as JSON and Python write them."""
MAX_SHOWN_LENGTH = 100
"""Longest value, in characters, that an error message shows whole."""


def key_of(attribute: str) -> str:
    """Return the key of an attribute: `from_` is written `from`, which Python reserves."""
    return attribute.removesuffix("_")


def attribute_of(key: str) -> str:
    """Return the attribute of a key, the inverse of `key_of`."""
    return f"{key}_" if keyword.iskeyword(key) else key


class _MismatchError(Exception):
    """A value does not have the type."""


def apply_values(config: T, raw: Mapping[str, Any], key: str = "") -> T:
    """Return a configuration with the values of `raw` set; `key` is its own key in a cell.

    Mappings such as `router.losses` are merged. Raises UsageError for unknown keys and for values of another type.
    """
    hints = _field_types(type(config))  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in raw.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise _explain_unknown_key(config, path, hints)
        attribute = attribute_of(name)
        current = getattr(config, attribute)
        if dataclasses.is_dataclass(current):
            values[attribute] = apply_values(current, _require_mapping(value, path), path)
        else:
            given = convert(value, hints[name], path)
            values[attribute] = {**current, **given} if isinstance(current, dict) and isinstance(given, dict) else given
    check_undeclared(type(config), values, key)
    changed: T = dataclasses.replace(config, **values)  # type: ignore[type-var]
    return changed


def convert(value: Any, kind: Any, key: str) -> Any:
    """Return a value converted to the type `kind`; raise UsageError naming the key if it does not fit."""
    try:
        return _fit(value, kind, key)
    except _MismatchError:
        allowed = _describe(kind)
        if isinstance(value, str) and not isinstance(value, PlainScalar) and _fits(PlainScalar(value), kind, key):
            allowed += ", without quotes"
        options = [option for option in get_args(kind) if isinstance(option, str)]
        near = suggest(str(value), options) if isinstance(value, str) else ""
        problem = f" ({value.problem})" if isinstance(value, MalformedYaml) else ""
        raise UsageError(f"{shorten(key)}: {_show(value)} was given{problem}.{near} Allowed: {allowed}") from None


def _fit(value: Any, kind: Any, key: str) -> Any:
    """Return a value converted to the type `kind`, or raise _MismatchError."""
    if kind == Untyped:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_record(value, kind, key)
    reader = _READERS.get(get_origin(kind) or kind)
    if reader is None:
        raise UsageError(f"{key}: options of type {kind} cannot be read from a configuration")
    return reader(value, kind, key)


def _fits(value: Any, kind: Any, key: str) -> bool:
    try:
        _fit(value, kind, key)
    except (_MismatchError, UsageError):
        return False
    return True


def _read_null(value: Any, kind: Any, key: str) -> None:
    if value is not None and not (isinstance(value, PlainScalar) and value in NULL):
        raise _MismatchError


def _read_bool(value: Any, kind: Any, key: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, PlainScalar) and value.strip() in TRUTH:
        return TRUTH[value.strip()]
    raise _MismatchError


def _read_int(value: Any, kind: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    spelled = INTEGER.fullmatch(value.strip()) if isinstance(value, PlainScalar) else None
    if spelled is None:
        raise _MismatchError
    base = {"decimal": 10, "octal": 8, "hex": 16}[spelled.lastgroup or "decimal"]
    return int(spelled[spelled.lastgroup or "decimal"], base)


def _read_float(value: Any, kind: Any, key: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(str(value))  # infinity instead of an error for very large integers
    if not isinstance(value, PlainScalar) or not NUMBER.fullmatch(value.strip()):
        raise _MismatchError
    text = value.strip()
    return float(re.sub(r"\.(?=[in])", "", text.lower()))


def _read_text(value: Any, kind: Any, key: str) -> str:
    if hasattr(value, "source"):
        return str(value.source)
    if not isinstance(value, str) or (isinstance(value, PlainScalar) and value in NULL):
        raise _MismatchError
    return str(value)


def _read_literal(value: Any, kind: Any, key: str) -> Any:
    for option in get_args(kind):
        if _fits(value, type(option), key) and _fit(value, type(option), key) == option:
            return option
    raise _MismatchError


def _read_union(value: Any, kind: Any, key: str) -> Any:
    members = sorted(get_args(kind), key=lambda member: (member is str, member is not types.NoneType))
    for member in members:
        if type(value) is member:
            return value
    for member in members:
        if _fits(value, member, key):
            return _fit(value, member, key)
    if len(members) == 2 and members[0] is types.NoneType:  # so that the error names the position in a list
        return _fit(value, members[1], key)
    raise _MismatchError


def _read_list(value: Any, kind: Any, key: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _MismatchError
    (member,) = get_args(kind) or (Any,)
    return [convert(item, member, f"{key}[{index}]") for index, item in enumerate(value)]


def _read_dict(value: Any, kind: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _MismatchError
    _, member = get_args(kind) or (str, Any)
    return {str(name): convert(item, member, f"{key}.{name}") for name, item in value.items()}


def _read_any(value: Any, kind: Any, key: str) -> Any:
    """Infer the type of a scalar from its text, for keys without a type."""
    if isinstance(value, Mapping):
        return {str(name): _read_any(item, kind, key) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_read_any(item, kind, key) for item in value]
    if not isinstance(value, PlainScalar):
        return value
    member = next((member for member in (types.NoneType, bool, int, float) if _fits(value, member, key)), str)
    return _fit(value, member, key)


_READERS: dict[Any, Callable[[Any, Any, str], Any]] = {
    types.NoneType: _read_null,
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_text,
    Literal: _read_literal,
    Union: _read_union,
    types.UnionType: _read_union,
    list: _read_list,
    dict: _read_dict,
    Any: _read_any,
}


def _build_record(value: Any, kind: Any, key: str) -> Any:
    """Return a mapping as an instance of the dataclass `kind`."""
    if isinstance(value, kind):
        return value
    hints = _field_types(kind)
    given = _require_mapping(value, key)
    for name in given:
        if name not in hints:
            raise _explain_unknown_key(kind, f"{key}.{name}", hints)
    values = {attribute_of(name): convert(item, hints[name], f"{key}.{name}") for name, item in given.items()}
    for option in dataclasses.fields(kind):
        has_default = (option.default, option.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if option.name not in values and not has_default:
            raise UsageError(f"{key}: the key '{option.name}' is missing")
    return kind(**values)


@lru_cache(maxsize=1024)
def require_readable(config_class: type) -> None:
    """Raise UsageError for an option of a type that no file can give, NameError for a type that is not defined."""
    for name, kind in _field_types(config_class).items():
        if not _is_readable(kind):
            raise UsageError(f"option '{name}' has the type {kind}, which cannot be read from a configuration")


def _is_readable(kind: Any) -> bool:
    if kind == Untyped or get_origin(kind) is Literal:
        return True
    if dataclasses.is_dataclass(kind):
        return all(map(_is_readable, _field_types(kind).values()))  # type: ignore[arg-type]
    return (get_origin(kind) or kind) in _READERS and all(map(_is_readable, get_args(kind)))


@lru_cache(maxsize=1024)
def _field_types(config_class: type) -> dict[str, Any]:
    hints = get_type_hints(config_class, include_extras=True)
    return {key_of(option.name): hints[option.name] for option in dataclasses.fields(config_class)}


def _require_mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{key}: must be a mapping of keys to values, got {_show(value)}")
    return value


def _explain_unknown_key(config: Any, path: str, hints: Mapping[str, Any]) -> UsageError:
    parent, _, leaf = path.rpartition(".")
    name = getattr(config, "name", None) if "." not in parent else None
    owner = f"{parent} '{name}'" if parent and name else (parent or "the top level")
    allowed = ", ".join(sorted(hints))
    return UsageError(
        f"{shorten(path)}: {owner} has no key '{shorten(leaf)}'.{suggest(leaf, hints)} Allowed: {allowed}"
    )


def _show(value: Any) -> str:
    if value is None or (isinstance(value, PlainScalar) and value in NULL):
        return "null"
    shown = repr(str(getattr(value, "source", value))) if isinstance(value, str | list | dict) else str(value)
    return shown if len(shown) <= MAX_SHOWN_LENGTH else f"{shown[:MAX_SHOWN_LENGTH]}..."


def _describe(kind: Any) -> str:
    """Return the allowed values of a type as text."""
    origin, members = get_origin(kind) or kind, get_args(kind)
    if kind in (Any, Untyped):
        return "anything"
    if origin is Literal:
        return ", ".join(str(option) for option in members)
    if origin in (Union, types.UnionType):
        return ", or ".join(_describe(member) for member in sorted(members, key=lambda m: m is types.NoneType))
    if origin is list:
        return f"a list, [a, b], each entry {_describe(members[0]) if members else 'anything'}"
    if origin is dict:
        return "a mapping, {key: value}"
    known = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    return known.get(kind, "a mapping, {key: value}")
