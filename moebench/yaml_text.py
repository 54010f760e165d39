"""YAML whose scalars keep their text: what `007`, `on` or `1:30` is, the key decides that it is given to.

A reader of plain YAML decides by the looks of a scalar, before anybody knows the key: a path 007 becomes 7, a label
`on` becomes true, `010` becomes 8.
"""

from collections.abc import Iterator
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

PREFIX = "tag:yaml.org,2002:"
PLAIN = f"{PREFIX}plain"
"""The tag that a scalar without quotes and without a tag gets here."""
TYPED = tuple(f"{PREFIX}{name}" for name in ("int", "float", "bool", "null"))
"""Explicit tags that say no more than the key does."""
MERGE = "<<"


class Plain(str):
    """A scalar without quotes: text, or the number, truth value or null that it spells."""

    __slots__ = ()


class MalformedYaml(Plain):
    """What begins like a list, a mapping or a text in quotes and is none: plain text, for keys that want text."""

    problem = ""


class WrittenMapping(dict[str, Any]):
    """A mapping from the command line, with its text: a key of type str takes that."""

    source = ""


class WrittenList(list[Any]):
    """A list from the command line, with its text: a key of type str takes that."""

    source = ""


def parse_yaml(text: str, name: str = "the value") -> Any:
    """Return mappings, lists, `Plain` for scalars without quotes and str for those with; None for an empty text.

    Raises yaml.YAMLError for what is no YAML, for a key given twice and for tags other than those of JSON's types.
    Merge keys (`<<`) are applied.
    """
    loader = _Loader(text)
    loader.name = name  # as errors call it
    try:
        node = loader.get_single_node()
        return None if node is None else _NodeReader().read(node)
    except RecursionError as error:
        raise yaml.YAMLError("mappings and lists are nested too deeply") from error
    finally:
        loader.dispose()


def parse_override(text: str) -> Any:
    """Return the value that stands behind `key=` on a command line.

    A whole value in quotes is what is between them; a list or mapping is written as in YAML, [a, b] or {a: b}, and
    remembers its text; all else is the text itself.
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
    return Plain(text) if text else ""  # nothing is no text; null is written out


class _Loader(yaml.SafeLoader):
    """Tags the scalars without quotes and tags as such, and not by their looks."""

    def compose_scalar_node(self, anchor: Any) -> ScalarNode:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        node: ScalarNode = super().compose_scalar_node(anchor)
        if event.style in (None, "") and event.tag is None:
            node.tag = PLAIN
        elif event.tag == "!":
            node.tag = f"{PREFIX}str"
        return node


class _NodeReader:
    """Turns the nodes of one document into values, each node once however many aliases it has."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}
        self._open: set[int] = set()

    def read(self, node: Node) -> Any:
        if id(node) in self._open:
            raise _refusal(node, "found an anchor inside what it stands for")
        if id(node) not in self._known:
            self._open.add(id(node))
            self._known[id(node)] = self._build(node)
            self._open.remove(id(node))
        return self._known[id(node)]

    def _build(self, node: Node) -> Any:
        if isinstance(node, ScalarNode) and node.tag in (PLAIN, *TYPED):
            return Plain(node.value)
        if isinstance(node, ScalarNode) and node.tag == f"{PREFIX}str":
            return node.value
        if isinstance(node, SequenceNode) and node.tag == f"{PREFIX}seq":
            return [self.read(item) for item in node.value]
        if isinstance(node, MappingNode) and node.tag == f"{PREFIX}map":
            return self._build_mapping(node)
        raise _refusal(node, f"the tag '{node.tag}' is not allowed")

    def _build_mapping(self, node: MappingNode) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise _refusal(key, "found a key that is no scalar")
            if key.value in seen:
                raise _refusal(key, f"found duplicate key '{key.value}'")
            seen.add(key.value)
            if key.value == MERGE and key.tag == PLAIN:
                for mapping in self._read_merged(value):
                    merged = {**mapping, **merged}  # the first one wins
            else:
                own[key.value] = self.read(value)
        return merged | own

    def _read_merged(self, node: Node) -> Iterator[dict[str, Any]]:
        for source in node.value if isinstance(node, SequenceNode) else [node]:
            if not isinstance(source, MappingNode):
                raise _refusal(source, f"'{MERGE}' needs a mapping, or a list of mappings")
            yield self.read(source)


def _refusal(node: Node, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)
