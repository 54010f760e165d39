"""The rules for registering a component: its base class, its Config, its facts and its methods.

Each function returns what is wrong, worded to follow the name of the component in a message, or an empty text.
"""

import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from types import FunctionType
from typing import Any, Literal, get_args, get_origin

from moebench.plugin_errors import find_plugin_line, is_plugin

CONFIG_RULE = "must be decorated with @dataclass(frozen=True, kw_only=True)"


def find_function_problem(item: object) -> str:
    """Return why an object is not a function of one argument, such as a loss."""
    if not callable(item):
        return f" must be a function, got {type(item).__name__}"
    signature = inspect.signature(item)
    return (
        ""
        if _can_bind(signature, 1)
        else f": it must take one argument, got {getattr(item, '__name__', '')}{_drop_types(signature)}"
    )


def find_class_problem(item: object, item_type: type, config_type: type) -> str:
    """Return why an object is not a class that derives from `item_type` and has a valid Config."""
    if not (isinstance(item, type) and issubclass(item, item_type)):
        return f" must be a class that derives from {item_type.__name__}"
    problem = _find_config_problem(getattr(item, "Config", None), config_type)
    if problem or not is_plugin(item):  # the methods of built-in components are checked by a test
        return problem
    return find_method_problem(item)


def _find_config_problem(config: Any, config_type: type) -> str:
    if config is None:
        return ""  # it has no name either
    if not (isinstance(config, type) and "__dataclass_params__" in vars(config)):
        return f": its Config {CONFIG_RULE}"
    if config_type not in config.__mro__:
        return f": its Config must derive from {config_type.__name__}"
    for field in dataclasses.fields(config):
        if field.name != "name" and field.default is field.default_factory is dataclasses.MISSING:
            return f": option '{field.name}' of its Config needs a default"
    return ""


def find_dataclass_problem(error: BaseException) -> str:
    """Return file, line and rule of a Config that `dataclasses` refuses; empty: the error has another cause."""
    location, frames = find_plugin_line(error), list(traceback.walk_tb(error.__traceback__))
    if not isinstance(error, TypeError) or location is None or frames[-1][0].f_globals is not vars(dataclasses):
        return ""
    return f"{location[0]}:{location[1]}: a Config {CONFIG_RULE}, with a default for every option ({error})"


def find_method_problem(item: type) -> str:
    """Return which method of a component shared code cannot call."""
    missing = sorted(getattr(item, "__abstractmethods__", ()))
    if missing:
        return f": it must define {', '.join(missing)}"
    problems = (_find_override_problem(item, owner, name) for owner, name in _list_contract(item))
    return next((f": {problem}" for problem in problems if problem), "")


def _list_contract(item: type) -> Iterator[tuple[type, str]]:
    """Yield the public methods and properties of the built-in classes that a component derives from.

    Those of other components, which have a Config, are not part of the contract.
    """
    for owner in item.__mro__:
        if owner.__module__.startswith("moebench.") and "Config" not in vars(owner):
            for name, value in vars(owner).items():
                if not name.startswith("_") and isinstance(value, FunctionType | staticmethod | classmethod | property):
                    yield owner, name


def _find_override_problem(item: type, owner: type, name: str) -> str:
    """Return how a component's own version of a method or property differs from the contract."""
    base, given = vars(owner)[name], inspect.getattr_static(item, name)
    if given is base:
        return ""
    if isinstance(base, property):
        return f"{name} must be a property" if isinstance(given, FunctionType | staticmethod | classmethod) else ""
    if isinstance(given, property | cached_property) or not callable(getattr(item, name)):
        return f"{name} must be a method"
    if isinstance(base, staticmethod | classmethod) and isinstance(given, FunctionType):
        return f"{name} must be a static or class method"
    arguments = list(inspect.signature(getattr(owner, name)).parameters)[isinstance(base, FunctionType) :]
    try:
        signature = inspect.signature(getattr(item, name))
    except (TypeError, ValueError):  # not written in Python
        return ""
    if _can_bind(signature, len(arguments) + isinstance(given, FunctionType)):
        return ""
    return f"{name} must take ({', '.join(arguments)}), got {name}{_drop_types(signature)}"


def _drop_types(signature: inspect.Signature) -> inspect.Signature:
    """Return a signature without annotations, which contain the names of modules made for plug-in files."""
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)


def _can_bind(signature: inspect.Signature, num_arguments: int) -> bool:
    """Return whether a function accepts this number of positional arguments."""
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError:
        return False
    return True


def find_facts_problem(facts: Any, facts_type: Callable[..., Any]) -> str:
    """Return which fact has a value of another type than declared."""
    for field in dataclasses.fields(facts):
        value, declared = getattr(facts, field.name), field.type
        if isinstance(declared, type) and not get_args(declared) and not isinstance(value, declared):
            return f"{facts_type.__name__}({field.name}) must be of type {declared.__name__}, got {value!r}"
        if get_origin(declared) is Literal and value not in get_args(declared):
            allowed = ", ".join(map(repr, get_args(declared)))
            return f"{facts_type.__name__}({field.name}) must be one of {allowed}, got {value!r}"
    return ""
