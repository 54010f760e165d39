"""Read a pickle as plain values: no class is looked up, nothing is called, no code can run.

`pickle` builds objects by calling what the file names. A description of tensors needs only their names and numbers, so
this reader interprets the 27 opcodes that such a description consists of and refuses all others.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE")
TUPLE_LENGTHS = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PlainPickleError(ValueError):
    """The file has an opcode that no description of tensors needs, or is no pickle."""


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that a pickle refers to, as `module.name`; it is not imported."""

    text: str


@dataclass(eq=False)
class Record:
    """What a pickle would build by a call: the name of the class or function, the arguments, the state set later."""

    name: str
    args: Any
    state: Any = None


class Pairs(list[tuple[Any, Any]]):
    """The keys and values of a mapping. Keys are not hashed: a crafted key would take exponential time."""


def read_plain_pickle(content: bytes) -> Any:
    """Return the value of a pickle, where `Name`, `Record` and `Pairs` replace classes, objects and mappings.

    Raises PlainPickleError for any other content.
    """
    try:
        return _Reader().read(content)
    except PlainPickleError:
        raise
    except (ValueError, IndexError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise PlainPickleError(f"it is not a pickle of plain values ({error})") from error


class _Reader:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        """The stacks below each mark."""
        self.memo: list[Any] = []

    def read(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                break
            self._apply(opcode.name, argument)
        return self.stack.pop()

    def _apply(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in LITERALS:
            stack.append(argument)
        elif opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in TUPLE_LENGTHS:
            length = TUPLE_LENGTHS[opcode]
            stack[len(stack) - length :] = [tuple(stack[len(stack) - length :])]
        else:
            self._apply_structure(opcode, argument)

    def _apply_structure(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marked.append(self.stack)
                self.stack = []
            case "MEMOIZE":
                self.memo.append(self.stack[-1])
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "EMPTY_DICT":
                self.stack.append(Pairs())
            case "EMPTY_LIST":
                self.stack.append([])
            case "TUPLE":
                values = tuple(self._pop_to_mark())
                self.stack.append(values)
            case "APPEND":
                self._extend([self.stack.pop()])
            case "APPENDS":
                self._extend(self._pop_to_mark())
            case "SETITEM":
                value, key = self.stack.pop(), self.stack.pop()
                self._update([key, value])
            case "SETITEMS":
                self._update(self._pop_to_mark())
            case "STACK_GLOBAL":
                name, module = self.stack.pop(), self.stack.pop()
                if not (isinstance(name, str) and isinstance(module, str)):
                    raise PlainPickleError("it refers to a class without a name")
                self.stack.append(Name(f"{module}.{name}"))
            case "NEWOBJ" | "REDUCE":
                args, name = self.stack.pop(), self.stack.pop()
                self.stack.append(Record(name.text, args))
            case "BUILD":
                state = self.stack.pop()
                self.stack[-1].state = state
            case _:
                raise PlainPickleError(f"it has the instruction {opcode}, which no description of tensors needs")

    def _pop_to_mark(self) -> list[Any]:
        """Return the values above the last mark, and remove them."""
        values, self.stack = self.stack, self.marked.pop()
        return values

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise PlainPickleError(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not Pairs:
            raise PlainPickleError(f"it sets items of a {type(target).__name__}")
        target.extend(zip(items[::2], items[1::2], strict=True))
