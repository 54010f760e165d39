"""A registered component: its class or function, where it is defined, and its errors."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from moebench.plugin_errors import convert_errors, is_plugin

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
        """Whether the component comes from a plug-in file or another package: its contract is checked in use."""
        return is_plugin(self.item)

    @property
    def label(self) -> str:
        """Kind, name and file of the component, to start a message with."""
        return f"{self.kind} '{self.name}' ({self.origin})"

    def convert_errors(self, method: str) -> AbstractContextManager[None]:
        """Convert exceptions of a plug-in to ContractError, which names component and method; leave those of others."""
        return convert_errors(lambda: f"{self.label}: {method}") if self.is_plugin else nullcontext()

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
