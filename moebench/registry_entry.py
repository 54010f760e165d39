"""A registered component: its class or function, where it is defined, and its errors."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from moebench.plugin_errors import contract_errors, is_plugin

T = TypeVar("T")
F = TypeVar("F")


@dataclass(frozen=True)
class Entry(Generic[T, F]):
    """One registered component: its name, the object and its facts."""

    kind: str
    name: str
    item: T
    facts: F

    @property
    def is_plugin(self) -> bool:
        """Whether it comes from a plug-in file or another package: its contract is checked when it is used."""
        return is_plugin(self.item)

    @property
    def label(self) -> str:
        """Its kind, name and file, as the start of a message."""
        return f"{self.kind} '{self.name}' ({self.origin})"

    def errors_of(self, method: str) -> AbstractContextManager[None]:
        """Name the component and the method in the errors of a plug-in; those of a built-in one stay as they are."""
        return contract_errors(lambda: f"{self.label}: {method}") if self.is_plugin else nullcontext()

    @cached_property
    def origin(self) -> str:
        """`file:line` of the definition; found by parsing the file, which takes most of the time of an import."""
        return find_origin(self.item)

    @property
    def doc(self) -> str:
        """The docstring of the component."""
        return inspect.getdoc(self.item) or ""


def find_origin(item: object) -> str:
    """Return `file:line` of the definition of a class or function."""
    try:
        file = inspect.getsourcefile(item)  # type: ignore[arg-type]
        return f"{file}:{inspect.getsourcelines(item)[1]}"  # type: ignore[arg-type]
    except (OSError, TypeError):
        return f"{getattr(item, '__module__', '?')}"
