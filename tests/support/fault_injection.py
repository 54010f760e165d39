"""Find the calls that a runner makes while cells train, and make chosen functions raise."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any


class InjectedError(Exception):
    """Raised in place of the call of a function."""


def record_side_calls(
    action: Callable[[], Any], start: FunctionType, is_side: Callable[[str], bool]
) -> list[FunctionType]:
    """Run the action; return the functions of moebench that this thread called from the first call of `start` on.

    Those are left out that `is_side` refuses by their full name, and those that a side function calls: what they raise
    is raised by it.
    """
    codes: dict[CodeType, None] = {}
    known: dict[CodeType, bool] = {}
    has_started = False

    def is_side_frame(frame: FrameType) -> bool:
        code = frame.f_code
        if code not in known:
            module = frame.f_globals.get("__name__", "")
            known[code] = module.startswith("moebench.") and is_side(f"{module}.{code.co_qualname}")
        return known[code]

    def observe(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal has_started
        has_started |= frame.f_code is start.__code__
        if not has_started or event != "call" or frame.f_code in codes or not is_side_frame(frame):
            return
        caller = frame.f_back
        while caller is not None and not is_side_frame(caller):
            caller = caller.f_back
        if caller is None:
            codes[frame.f_code] = None

    sys.setprofile(observe)
    try:
        action()
    finally:
        sys.setprofile(None)
    gc.unfreeze()  # the test run has frozen what was imported first, and then it is not among the referrers
    referrers = [function for code in codes for function in gc.get_referrers(code)]
    gc.freeze()
    return [each for each in referrers if isinstance(each, FunctionType) and each.__code__ in codes]


@contextlib.contextmanager
def raise_in(functions: Iterable[FunctionType]) -> Iterator[None]:
    """Have every call of the functions raise InjectedError, wherever and under whichever name they were imported."""
    originals = {function: function.__code__ for function in functions}
    try:
        for function, code in originals.items():
            function.__code__ = _raising_code(full_name(function), code.co_freevars)
        yield
    finally:
        for function, code in originals.items():
            function.__code__ = code


def full_name(function: FunctionType) -> str:
    """Return the module and the qualified name of a function."""
    return f"{function.__module__}.{function.__qualname__}"


def _raising_code(name: str, free_variables: tuple[str, ...]) -> CodeType:
    """Return the code of a function that raises; it has the free variables of the one that it replaces."""
    lines = ["def outer():", *(f"    {variable} = None" for variable in free_variables)]
    lines += ["    def raising(*arguments, **options):", *(f"        {variable}" for variable in free_variables)]
    lines += ["        from support.fault_injection import InjectedError", f"        raise InjectedError({name!r})"]
    source = "\n".join([*lines, "    return raising"])
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    code: CodeType = namespace["outer"]().__code__
    return code
