"""Keys of config.json that stand for a setting of moebench, read and written by the same table."""

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

from moebench.errors import UsageError

Entries = Mapping[str, Any]
"""Keys of config.json and their values."""
Value = TypeVar("Value", bound=Hashable)
Choice = Mapping[Value, Entries]
"""Value of a setting -> the entries of config.json that stand for it; {} where the architecture always has it."""

MAX_NUMBER = 2**31


class ConfigKeys:
    """The values of a config.json, defaults included, with errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values, self.file = values, file

    def number(self, key: str, limit: int = MAX_NUMBER) -> int:
        """Return a number of modules or units, at least 1 and at most `limit`."""
        value = self.values.get(key)
        if type(value) is not int or not 1 <= value <= limit:
            raise self.refuse(key, f"a whole number from 1 to {limit}")
        return value

    def choose(self, choice: Mapping[Value, Entries], what: str) -> Value:
        """Return the value of a setting; raise UsageError, which names `what` moebench has, for any other entry."""
        for value, entries in choice.items():
            if all(self.values.get(key) == given for key, given in entries.items()):
                return value
        key = next(key for entries in choice.values() for key in entries)
        allowed = ", ".join(repr(entries[key]) for entries in choice.values())
        raise self.refuse(key, f"{allowed} ({what})")

    def require(self, entries: Entries, what: str = "") -> None:
        """Raise UsageError for the first of the keys that has another value."""
        for key, value in entries.items():
            if self.values.get(key) != value:
                raise self.refuse(key, f"{value!r} ({what})" if what else repr(value))

    def refuse(self, key: str, allowed: str) -> UsageError:
        """Return the error for a value that moebench does not compute."""
        return UsageError(f"{self.file}: {key} is {self.values.get(key)!r}; allowed in a model of moebench: {allowed}")
