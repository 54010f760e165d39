"""Registries of routers, layouts, tasks and losses: built in, installed or from a plug-in file.

Each component is one file: what a file in the registry's package registers is in the command line, the configuration,
the tables and the contract tests; nothing else has to be edited.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from moebench.component_rules import (
    find_class_problem,
    find_dataclass_problem,
    find_facts_problem,
    find_function_problem,
)
from moebench.errors import UsageError, build_unknown_error
from moebench.plugin_errors import PLUGIN_MODULE, describe_error
from moebench.plugin_sources import digest_sources
from moebench.registry_entry import Entry as Entry
from moebench.registry_entry import find_origin

T = TypeVar("T")
F = TypeVar("F")

HOMES = {
    "router": "moebench.routing.router:ROUTERS",
    "loss": "moebench.routing.losses:LOSSES",
    "layout": "moebench.experts.layout:LAYOUTS",
    "task": "moebench.tasks.task:TASKS",
}
"""Module and name of each registry; `get_registry` imports it on first use."""

FOLDERS = {"router": "routing/routers", "layout": "experts/layouts", "task": "tasks"}
"""Folders of the built-in files of each kind."""


class Registry(Generic[T, F]):
    """A table of components of one kind, filled on first use by importing every file of `package` (if it has one)."""

    def __init__(
        self,
        kind: str,
        package: str | None,
        *,
        item_type: type | None = None,
        config_type: type = object,
        facts_type: type | None = None,
    ) -> None:
        """`item_type`, `config_type`: what components and their Config derive from; None: they are functions.

        `facts_type`: what they are registered with; None: they and functions are not checked.
        """
        self.kind = kind
        self.package = package
        self.item_type = item_type
        self.config_type = config_type
        self.facts_type = facts_type
        self._entries: dict[str, Entry[T, F]] = {}
        self._loaded = False

    def register(self, facts: F, name: str | None = None) -> Callable[[T], T]:
        """Return a decorator that enters a class or function under `name` (default: the name in its `Config`).

        Raises UsageError, which names the file, for a component that breaks a rule of registration.
        """
        if self.facts_type is not None:
            got, rule = getattr(facts, "__name__", facts), ""
            if not isinstance(facts, self.facts_type):
                rule = f"a {self.kind} is registered with @...register({self.facts_type.__name__}(...)), got {got}"
            if rule := rule or find_facts_problem(facts, self.facts_type):
                caller = sys._getframe(1)
                raise UsageError(f"{caller.f_code.co_filename}:{caller.f_lineno}: {rule}")

        def enter(item: T) -> T:
            given = name or getattr(getattr(item, "Config", None), "name", "")
            key = given if isinstance(given, str) else ""
            if problem := self._find_problem(item, key):
                raise UsageError(f"{find_origin(item)}: {problem}")
            self._entries[key] = Entry(self.kind, key, item, facts)
            return item

        return enter

    def get(self, name: str, where: str | None = None) -> Entry[T, F]:
        """Return the entry called `name`; `where` is the configuration key to name in the error."""
        self._load()
        if name not in self._entries:
            error = build_unknown_error(where or self.kind, name, self._entries)
            raise UsageError(f"{error} (and those of a file given by --plugin)")
        return self._entries[name]

    def entries(self) -> list[Entry[T, F]]:
        """Return every entry, sorted by name."""
        self._load()
        return [self._entries[name] for name in sorted(self._entries)]

    def names(self) -> list[str]:
        """Return every registered name, sorted."""
        return [entry.name for entry in self.entries()]

    def _find_problem(self, item: T, key: str) -> str:
        if self.item_type is None:
            problem = find_function_problem(item) if self.facts_type is not None else ""
            remedy = "register it with name='...'"
        else:
            problem = find_class_problem(item, self.item_type, self.config_type)
            remedy = "give its Config a field name: str = '...'"
        if problem:
            return f"this {self.kind}{problem}"
        if not key:
            return f"this {self.kind} has no name; {remedy}"
        if key in self._entries and not _is_same_definition(item, self._entries[key].item):
            return f"{self.kind} '{key}' is already defined in {self._entries[key].origin}"
        return ""

    def _load(self) -> None:
        if self._loaded:
            return
        if self.package:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=f"moebench.{self.kind}s"):
            try:
                point.load()
            except Exception as error:  # a third-party package: name it in one line
                raise UsageError(
                    f"installed {self.kind} '{point.name}' ({point.value}): {describe_error(error)}"
                ) from error
        self._loaded = True


def _is_same_definition(item: object, earlier: object) -> bool:
    """Whether a component defined in a session or notebook is executed again: the later definition replaces it."""
    names = [(getattr(one, "__module__", ""), getattr(one, "__qualname__", "")) for one in (item, earlier)]
    return names[0] == names[1] and names[0][0] == "__main__"


def get_registry(kind: str) -> "Registry[Any, Any]":
    """Return the registry of a kind ("router", "loss", "layout", "task"), importing its module if needed."""
    module, _, attribute = HOMES[kind].partition(":")
    registry: Registry[Any, Any] = getattr(importlib.import_module(module), attribute)
    return registry


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plugin file that was loaded."""

    file: Path
    """Absolute."""
    digest: str
    """SHA-256 (hex) of its text; with that of the files beside it that it imports, if there are such."""
    names: frozenset[str]
    """What it registers."""
    module: str
    parents: frozenset[str]
    """Modules of the plugins whose classes its own derive from."""


DIGITS = 12
"""Digits of a plugin file's digest in the name of its module."""
_PLUGINS: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
"""Names and parents of each plugin module: what it registers is seen once, when it is executed."""
_DIGESTS: dict[str, set[str]] = {}
"""Name of a plugin file, without its ending -> the digests that were executed."""


def load_plugin(path: str) -> Plugin:
    """Import a plugin file, so that what it registers exists.

    Raises UsageError when the file is missing or fails to import.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"--plugin {path}: no such file")
    # The content is part of the name: an edited plugin is another module, the same one is imported once.
    name = f"{PLUGIN_MODULE}{file.stem}_{hashlib.sha256(file.read_bytes()).hexdigest()[:DIGITS]}"
    if name not in sys.modules:
        # Built-in files are loaded first, so that a name registered twice is the mistake of the plug-in.
        before = {(kind, key) for kind, key, _ in _list_registered()}
        _execute(name, path)
        entered = [(key, item) for kind, key, item in _list_registered() if (kind, key) not in before]
        bases = {base.__module__ for _, item in entered for base in getattr(item, "__mro__", ())}
        parents = frozenset(module for module in bases if module.startswith(PLUGIN_MODULE)) - {name}
        _PLUGINS[name] = frozenset(key for key, _ in entered), parents
        _DIGESTS.setdefault(file.stem, set()).add(digest_sources(file))
    names, parents = _PLUGINS[name]
    return Plugin(file=file.resolve(), digest=digest_sources(file), names=names, module=name, parents=parents)


def require_plugins(paths: Sequence[str], digests: Sequence[str], owner: str) -> None:
    """Raise UsageError unless a plugin file of the same name and content as each path is loaded; execute none.

    `digests`: of the files when the run was planned; empty for runs of versions that did not record them.
    """
    missing = [path for path in paths if Path(path).stem not in _DIGESTS]
    if missing:
        raise UsageError(
            f"{owner} needs the plug-in {missing[0]}, which is code that the run's folder names; if you trust it, give"
            f" plugins={missing}"
        )
    for path, digest in zip(paths, digests, strict=False):
        if digest not in _DIGESTS[Path(path).stem]:
            raise UsageError(
                f"{owner} was trained with a different version of the plug-in {path}; restore the file, and"
                f" give plugins=[{path!r}] in a new process"
            )


def select_plugins(plugins: Sequence[Plugin], words: Iterable[str]) -> list[Plugin]:
    """Return the plug-ins that a cell needs; `words`: all strings of its configuration that may name a component.

    They are the plug-ins that register one of these names, those whose classes they derive from, and those that
    register nothing, whose effect is unknown.
    """
    named = set(words)
    needed = [plugin for plugin in plugins if not plugin.names or plugin.names & named]
    for plugin in needed:  # grows during the loop
        needed += [other for other in plugins if other.module in plugin.parents and other not in needed]
    return [plugin for plugin in plugins if plugin in needed]


def _list_registered() -> list[tuple[str, str, Any]]:
    return [(kind, entry.name, entry.item) for kind in HOMES for entry in get_registry(kind).entries()]


def _execute(name: str, path: str) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--plugin {path}: not a Python file (a name ending in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UsageError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UsageError(find_dataclass_problem(error) or f"--plugin {path}: {describe_error(error)}") from error


def names_without_import(kind: str) -> list[str]:
    """Return the built-in names of a kind, read from source without imports, so that shell completion is fast."""
    folder = Path(__file__).parent / FOLDERS[kind]
    return sorted(name for file in folder.glob("*.py") for name in _config_names(file))


def _config_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == "name"
            and isinstance(node.value, ast.Constant)
        ):
            yield str(node.value.value)


def field_docs(config_class: type) -> dict[str, str]:
    """Return the string below each field of a dataclass, read from its source; none if that is gone."""
    docs: dict[str, str] = {}
    for cls in reversed(config_class.__mro__[:-1]):
        docs |= _own_field_docs(cls)
    return docs


@cache
def _own_field_docs(cls: type) -> dict[str, str]:
    """Return the strings below the fields that the class itself defines; cached, as many classes share a base."""
    try:
        source = inspect.getsource(cls)
    except OSError:
        return {}
    docs = {}
    body = getattr(ast.parse(inspect.cleandoc("\n" + source)).body[0], "body", [])
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            value = getattr(text, "value", None)
            if isinstance(text, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                docs[field.target.id] = inspect.cleandoc(value.value)
    return docs
