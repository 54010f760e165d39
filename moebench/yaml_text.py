"""YAML whose scalars keep their text, so that the type of a key determines the meaning of `007`, `on` or `1:30`.

A plain YAML loader infers the type of a scalar before the key is known: a path 007 becomes 7, a label `on` becomes
true, `010` becomes 8.
"""

from collections.abc import Iterator
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

PREFIX = "tag:yaml.org,2002:"
PLAIN = f"{PREFIX}plain"
"""Tag of scalars without quotes and without an explicit tag."""
TYPED = tuple(f"{PREFIX}{name}" for name in ("int", "float", "bool", "null"))
"""Explicit tags that are ignored, because the key determines the type."""
MERGE = "<<"
MAX_VALUES = 100_000
"""Values that a document may have, each alias counted with all that its anchor has; 50 characters of text count as one.
Nine anchors of ten aliases each, a file of 300 bytes, are a billion values."""
MAX_CHARACTERS = 1 << 20
"""Longest document: a minute of reading."""


class PlainScalar(str):
    """The text of a scalar without quotes, which may mean a number, a truth value or null."""

    __slots__ = ()


class MalformedYaml(PlainScalar):
    """Text that begins like a list, a mapping or a quoted scalar but is not valid: plain text for keys of type str."""

    problem = ""


class WrittenMapping(dict[str, Any]):
    """A mapping from the command line with its source text, which keys of type str use."""

    source = ""


class WrittenList(list[Any]):
    """A list from the command line with its source text, which keys of type str use."""

    source = ""


def parse_yaml(text: str, name: str = "the value") -> Any:
    """Return mappings, lists, `PlainScalar` for unquoted scalars and str for quoted ones; None for an empty text.

    Merge keys (`<<`) are applied. Raises yaml.YAMLError for invalid YAML, duplicate keys and tags other than those of
    JSON types.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has more than {MAX_CHARACTERS} characters")
    loader = _Loader(text)
    loader.name = name  # in error messages
    try:
        node = loader.get_single_node()
        return None if node is None else _NodeReader().read(node)
    except RecursionError as error:
        raise yaml.YAMLError("mappings and lists are nested too deeply") from error
    finally:
        loader.dispose()


def parse_typed_yaml(text: str) -> Any:
    """Return a document of another program, with the types that YAML infers.

    Nothing in it is executed: raises ValueError for tags of any kind, for aliases, and for invalid YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has aliases; allowed: YAML without * and &")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def parse_override(text: str) -> Any:
    """Return the value after `key=` on a command line.

    A quoted value is the text between the quotes; a list or mapping is written as in YAML, [a, b] or {a: b}, and keeps
    its source text; everything else is plain text.
    """
    bare = text.strip()
    if bare[:1] in ("[", "{", "'", '"'):
        try:
            value = parse_yaml(bare)
        except yaml.YAMLError as error:
            malformed = MalformedYaml(text)
            malformed.problem = " ".join(str(error).split())
            return malformed
        if isinstance(value, dict | list):
            written = WrittenMapping(value) if isinstance(value, dict) else WrittenList(value)
            written.source = text
            return written
        return value
    return PlainScalar(text) if text else ""  # an empty value is an empty text, not null


class _Loader(yaml.SafeLoader):
    """A loader that tags unquoted scalars as plain instead of inferring their type."""

    def compose_scalar_node(self, anchor: Any) -> ScalarNode:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node: ScalarNode = super().compose_scalar_node(anchor)
        if event.style in (None, "") and event.tag is None:
            node.tag = PLAIN
        elif event.tag == "!":
            node.tag = f"{PREFIX}str"
        return node


class _NodeReader:
    """Converts the nodes of one document to values, each node once even if it has aliases."""

    def __init__(self) -> None:
        self._values: dict[int, Any] = {}
        self._in_progress: set[int] = set()
        self._sizes: dict[int, int] = {}
        """Number of values in the value of a node, with all aliases."""

    def read(self, node: Node) -> Any:
        if id(node) in self._in_progress:
            raise _parse_error(node, "found an anchor inside its own value")
        if id(node) not in self._values:
            self._in_progress.add(id(node))
            self._values[id(node)] = self._build(node)
            self._in_progress.remove(id(node))
            self._sizes[id(node)] = self._count_values(node)
            if self._sizes[id(node)] > MAX_VALUES:
                raise _parse_error(node, f"its aliases stand for more than {MAX_VALUES} values")
        return self._values[id(node)]

    def _count_values(self, node: Node) -> int:
        if isinstance(node, ScalarNode):
            return 1 + len(node.value) // 50
        parts = (part for item in node.value for part in (item if isinstance(item, tuple) else (item,)))
        return 1 + sum(self._sizes.get(id(part), 1) for part in parts)

    def _build(self, node: Node) -> Any:
        if isinstance(node, ScalarNode) and node.tag in (PLAIN, *TYPED):
            return PlainScalar(node.value)
        if isinstance(node, ScalarNode) and node.tag == f"{PREFIX}str":
            return node.value
        if isinstance(node, SequenceNode) and node.tag == f"{PREFIX}seq":
            return [self.read(item) for item in node.value]
        if isinstance(node, MappingNode) and node.tag == f"{PREFIX}map":
            return self._build_mapping(node)
        raise _parse_error(node, f"the tag '{node.tag}' is not allowed")

    def _build_mapping(self, node: MappingNode) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        values: dict[str, Any] = {}
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise _parse_error(key, "found a key that is not a scalar")
            if key.value in seen:
                raise _parse_error(key, f"found duplicate key '{key.value}'")
            seen.add(key.value)
            if key.value == MERGE and key.tag == PLAIN:
                for mapping in self._read_merged(value):
                    merged = {**mapping, **merged}  # the first one wins
            else:
                values[key.value] = self.read(value)
        return merged | values

    def _read_merged(self, node: Node) -> Iterator[dict[str, Any]]:
        for source in node.value if isinstance(node, SequenceNode) else [node]:
            if not isinstance(source, MappingNode):
                raise _parse_error(source, f"'{MERGE}' needs a mapping, or a list of mappings")
            yield self.read(source)


def _parse_error(node: Node, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)
