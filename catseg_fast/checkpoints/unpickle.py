"""Pickles read as data: nothing that a pickle names is looked up, imported or called.

`pickletools` parses; this module builds numbers, texts, lists, tuples and dictionaries. A name in a pickle
becomes a `Global`, which only holds that name. Where the pickle calls one, or restores an object's
state, a function of the caller's table answers; what has no entry there is refused.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

# Far more than a training checkpoint has: about 30 for each tensor.
MAX_OPCODES = 2_000_000
# Multiples of this number have equal hashes, and a dictionary of them takes quadratic time.
_HASH_MODULUS = sys.hash_info.modulus
_KEYS = (str, int, bool, type(None))


class RefusedPickle(ValueError):
    """A pickle names something that is not data."""


@dataclass(frozen=True, slots=True)
class Global:
    """A reference of a pickle to `name`, "module.name"."""

    name: str


class Restored:
    """Base of objects that a pickle gives a state after it has made them."""

    def restore(self, state: Any) -> None:
        """Take the state, which comes from the file."""
        raise NotImplementedError


class Opaque(Restored):
    """Stands for an object that is harmless and of no use here: it keeps nothing."""

    def restore(self, state: Any) -> None:
        """Ignore the state."""


def unpickle(
    file: IO[bytes],
    functions: Mapping[str, Callable[..., Any]],
    names: frozenset[str] = frozenset(),
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of the pickle that starts where `file` is; `file` is then behind it.

    Args:
        file: has `read`, `readline` and `tell`.
        functions: what answers a call of a name. It gets values from the file, and must check them.
        names: further names that may occur, but not be called.
        persistent: answers a persistent id, as torch's storages have.

    Raises:
        RefusedPickle: if another name occurs.
        ValueError: if the pickle is damaged, too long, or uses an opcode that data does not need.
    """
    machine = _Machine(functions, names, persistent)
    for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        if count >= MAX_OPCODES:
            raise ValueError(f"the pickle has more than {MAX_OPCODES} opcodes")
        step = _STEPS.get(opcode.name)
        if step is None:
            raise ValueError(f"the pickle's opcode {opcode.name} is not supported")
        try:
            step(machine, argument)
        except (IndexError, KeyError) as error:  # of the stack, the marks or the memo
            raise ValueError(f"the pickle is damaged at byte {position}") from error
    if len(machine.stack) != 1 or machine.below:
        raise ValueError("the pickle ends with more than one value, or none")
    return machine.stack[0]


class _Machine:
    """The stack machine that a pickle is a program of; a method for each kind of opcode."""

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        names: frozenset[str],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.functions, self.names, self.persistent = functions, names, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def ignore(self, _: Any) -> None:
        """PROTO and STOP."""

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_none(self, _: Any) -> None:
        self.stack.append(None)

    def push_true(self, _: Any) -> None:
        self.stack.append(True)

    def push_false(self, _: Any) -> None:
        self.stack.append(False)

    def push_list(self, _: Any) -> None:
        self.stack.append([])

    def push_dict(self, _: Any) -> None:
        self.stack.append({})

    def push_empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def push_opaque(self, _: Any) -> None:
        self.stack.append(Opaque())

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        values = self.stack
        self.stack = self.below.pop()
        return values

    def tuple_since_mark(self, _: Any) -> None:
        values = tuple(self.since_mark())
        self.stack.append(values)

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack.pop() for _ in range(count))[::-1]
        self.stack.append(values)

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        self.extend([value])

    def append_since_mark(self, _: Any) -> None:
        self.extend(self.since_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(values)
        elif type(target) is not Opaque:
            raise ValueError(f"the pickle appends to a {type(target).__name__}")

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def set_items_since_mark(self, _: Any) -> None:
        self.update(self.since_mark())

    def update(self, pairs: list[Any]) -> None:
        """Set the items key, value, key, value, … of the dictionary on the stack."""
        target = self.stack[-1]
        if type(target) is Opaque:
            return
        if type(target) is not dict or len(pairs) % 2:
            raise ValueError(f"the pickle sets {len(pairs) / 2:g} items of a {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in _KEYS or (type(key) is int and abs(key) >= _HASH_MODULUS):
                raise ValueError(f"the pickle has a dictionary key of type {type(key).__name__}")
            target[key] = value

    def push_global(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        if name.startswith("__builtin__."):  # as Python 2, and protocol 2, call it
            name = name.replace("__builtin__", "builtins", 1)
        if name not in self.functions and name not in self.names:
            raise RefusedPickle(f"it names {shown(name)}")
        self.stack.append(Global(name))

    def call(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if type(called) is not Global or called.name not in self.functions:
            raise RefusedPickle(f"it calls {shown(called.name) if type(called) is Global else 'a value'}")
        if type(arguments) is not tuple:
            raise ValueError(f"the pickle calls {called.name} with a {type(arguments).__name__}")
        self.stack.append(self.functions[called.name](*arguments))

    def restore(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Restored):
            target.restore(state)
        elif type(target) is not dict or type(state) is not dict:  # of an OrderedDict: its attributes
            raise ValueError(f"the pickle restores the state of a {type(target).__name__}")

    def load_persistent(self, _: Any) -> None:
        if self.persistent is None:
            raise ValueError("the pickle has a persistent id where there can be none")
        self.stack.append(self.persistent(self.stack.pop()))


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "STOP"), _Machine.ignore),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), _Machine.push
    ),
    "NONE": _Machine.push_none,
    "NEWTRUE": _Machine.push_true,
    "NEWFALSE": _Machine.push_false,
    "EMPTY_LIST": _Machine.push_list,
    "EMPTY_DICT": _Machine.push_dict,
    "EMPTY_TUPLE": _Machine.push_empty_tuple,
    "EMPTY_SET": _Machine.push_opaque,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_since_mark,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items_since_mark,
    "GLOBAL": _Machine.push_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "BUILD": _Machine.restore,
    "BINPERSID": _Machine.load_persistent,
}


def shown(name: str, longest: int = 100) -> str:
    """Return a name from a file as it may stand in a message: escaped, and cut where it is long."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= longest else f"{text[:longest]}…"
