"""The opcodes of pickle, protocols 0 to 5: the effect of each on the machine.

Source: CPython's `Lib/pickletools.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from weights_conversion.files.errors import printable
from weights_conversion.files.pickle_machine import Machine
from weights_conversion.files.pickle_values import Global, is_inert, storage

_MAX_INTEGER_BYTES = 256
_ESCAPE = re.compile(r"""\\(?:x([0-9a-fA-F]{2})|([\\'"nrt]))""")  # Python 2 writes no others


def _mark(machine: Machine) -> None:
    machine.marked.append(machine.stack)
    machine.stack = []


def _pop(machine: Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _dictionary(machine: Machine) -> None:
    items = machine.pop_mark()
    result: dict[Any, Any] = {}
    machine.set_items(result, items)
    machine.push(result)


def _append(machine: Machine) -> None:
    value = machine.pop()
    machine.extend(machine.top(), [value])


def _appends(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.extend(machine.top(), items)


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items(machine.top(), [key, value])


def _set_items(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.set_items(machine.top(), items)


def _last(count: int) -> Callable[[Machine], None]:
    def tuple_of_last(machine: Machine) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(items)))

    return tuple_of_last


def _global(machine: Machine) -> None:
    module, name = machine.line(), machine.line()
    machine.push(machine.name(module, name))


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(machine.name(module, name))


def _reduce(machine: Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.call(function, arguments)


def _new_object_with_keywords(machine: Machine) -> None:
    keywords, arguments, function = machine.pop(), machine.pop(), machine.pop()
    if keywords != {} and not (isinstance(function, Global) and is_inert(function)):
        raise machine.unsafe(f"makes an object of {printable(str(function)[:200])} by keywords")
    machine.call(function, arguments)


def _instance(machine: Machine) -> None:
    module, name = machine.line(), machine.line()
    arguments = tuple(machine.pop_mark())
    machine.call(machine.name(module, name), arguments)


def _object(machine: Machine) -> None:
    items = machine.pop_mark()
    if not items:
        raise machine.corrupt("an object has no class")
    machine.call(items[0], tuple(items[1:]))


def _build(machine: Machine) -> None:
    state = machine.pop()
    machine.build(machine.top(), state)


def _persistent(machine: Machine) -> None:
    machine.push(storage(machine.pop()))


def _refused(what: str) -> Callable[[Machine], None]:
    def refuse(machine: Machine) -> None:
        raise machine.unsafe(what)

    return refuse


def _integer_line(machine: Machine) -> None:
    line = machine.line().removesuffix("L")
    if line in ("00", "01"):  # False and True in protocol 1
        machine.push(line == "01")
        return
    if len(line) > _MAX_INTEGER_BYTES or not line.lstrip("+-").isdecimal():
        raise machine.corrupt("a number is none")
    try:
        machine.push(int(line))
    except ValueError as error:
        raise machine.corrupt("a number is none") from error


def _float_line(machine: Machine) -> None:
    try:
        machine.push(float(machine.line()))
    except ValueError as error:
        raise machine.corrupt("a number is none") from error


def _string_line(machine: Machine) -> None:
    line = machine.line("latin1")
    if len(line) < 2 or line[0] != line[-1] or line[0] not in "'\"":
        raise machine.corrupt("a text has no quotation marks")
    if "\\" in _ESCAPE.sub("", line[1:-1]):
        raise machine.corrupt("a text has a wrong escape")
    machine.push(_ESCAPE.sub(_unescaped, line[1:-1]))


def _unescaped(escape: re.Match[str]) -> str:
    code, letter = escape.groups()
    return chr(int(code, 16)) if code else {"n": "\n", "r": "\r", "t": "\t"}.get(letter, letter)


def _memo_line(action: Callable[[Machine, int], None]) -> Callable[[Machine], None]:
    def act(machine: Machine) -> None:
        _integer_line(machine)
        action(machine, machine.pop())

    return act


def _long(form: str) -> Callable[[Machine], None]:
    def push(machine: Machine) -> None:
        length = machine.number(form)
        if length < 0:
            raise machine.corrupt("a number has a negative length")
        content = machine.take(length)
        if length > _MAX_INTEGER_BYTES:
            raise machine.corrupt(f"a number has {length:,} bytes")
        machine.push(int.from_bytes(content, "little", signed=True))

    return push


def _counted(form: str, encoding: str | None = None, errors: str = "strict"):
    """Make an opcode of a length and as many bytes, which are a text if there is an encoding."""

    def push(machine: Machine) -> None:
        length = machine.number(form)
        if length < 0:
            raise machine.corrupt("a length is negative")
        content = machine.take(length)
        machine.push(content if encoding is None else machine.text(content, encoding, errors))

    return push


def _protocol(machine: Machine) -> None:
    version = machine.number("<B")
    if version > 5:
        raise machine.corrupt(f"it has the unknown protocol {version}")


def _constant(make: Callable[[], Any]) -> Callable[[Machine], None]:
    return lambda machine: machine.push(make())


def _value(form: str) -> Callable[[Machine], None]:
    return lambda machine: machine.push(machine.number(form))


_REGISTERED = _refused("asks for an object of the extension registry")
_BUFFER = _refused("asks for bytes outside the file")

OPCODES: dict[int, Callable[[Machine], None]] = {
    ord(code): action
    for code, action in {
        "(": _mark,
        "0": _pop,
        "1": lambda machine: machine.pop_mark() and None,
        "2": lambda machine: machine.push(machine.top()),
        "F": _float_line,
        "I": _integer_line,
        "L": _integer_line,
        "J": _value("<i"),
        "K": _value("<B"),
        "M": _value("<H"),
        "G": _value(">d"),
        "N": _constant(lambda: None),
        "P": _refused("has a persistent id that is not a storage's"),
        "Q": _persistent,
        "R": _reduce,
        "S": _string_line,
        "T": _counted("<i", "latin1"),  # strings of Python 2, which are ASCII in checkpoints
        "U": _counted("<B", "latin1"),
        "V": lambda machine: machine.push(machine.line("raw-unicode-escape")),
        "X": _counted("<I", "utf-8", "surrogatepass"),
        "a": _append,
        "b": _build,
        "c": _global,
        "d": _dictionary,
        "}": _constant(dict),
        "e": _appends,
        "g": _memo_line(Machine.get),
        "h": lambda machine: machine.get(machine.number("<B")),
        "j": lambda machine: machine.get(machine.number("<I")),
        "i": _instance,
        "l": lambda machine: machine.push(machine.pop_mark()),
        "]": _constant(list),
        "o": _object,
        "p": _memo_line(Machine.put),
        "q": lambda machine: machine.put(machine.number("<B")),
        "r": lambda machine: machine.put(machine.number("<I")),
        "s": _set_item,
        "u": _set_items,
        "t": lambda machine: machine.push(tuple(machine.pop_mark())),
        ")": _constant(tuple),
        "B": _counted("<I"),
        "C": _counted("<B"),
        "\x80": _protocol,
        "\x81": _reduce,  # NEWOBJ, of a class and its arguments
        "\x82": _REGISTERED,
        "\x83": _REGISTERED,
        "\x84": _REGISTERED,
        "\x85": _last(1),
        "\x86": _last(2),
        "\x87": _last(3),
        "\x88": _constant(lambda: True),
        "\x89": _constant(lambda: False),
        "\x8a": _long("<B"),
        "\x8b": _long("<i"),
        "\x8c": _counted("<B", "utf-8", "surrogatepass"),
        "\x8d": _counted("<Q", "utf-8", "surrogatepass"),
        "\x8e": _counted("<Q"),
        "\x8f": _constant(list),  # sets are kept as lists
        "\x90": _appends,
        "\x91": lambda machine: machine.push(machine.pop_mark()),
        "\x92": _new_object_with_keywords,
        "\x93": _stack_global,
        "\x94": lambda machine: machine.put(len(machine.memo)),
        "\x95": lambda machine: machine.number("<Q") and None,  # a frame serves faster reading
        "\x96": _counted("<Q"),
        "\x97": _BUFFER,
        "\x98": _BUFFER,
    }.items()
}
