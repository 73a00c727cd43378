"""The state of the pickle interpreter: position, stack, memo, and the rest of the budget."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weights_conversion.files.errors import (
    CheckpointLimit,
    CorruptCheckpoint,
    UnsafeCheckpoint,
    printable,
)
from weights_conversion.files.limits import Limits
from weights_conversion.files.pickle_values import (
    Global,
    Placeholder,
    Unusable,
    call,
    dictionary_key,
    is_inert,
)

_MAX_LINE = 1_000_000
_STOP = ord(".")


class Machine:
    """The stack of the interpreter, its older stacks (one for each mark), and its memo."""

    def __init__(self, path: Path, content: bytes, begin: int, limits: Limits):
        self.path, self.content, self.limits = path, content, limits
        self.position = self.opcode_at = begin
        self.left = limits.opcodes
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, opcodes: Mapping[int, Callable[[Machine], None]]) -> Any:
        """Interpret opcodes up to the one that ends the pickle, and return the top of the stack."""
        content, end = self.content, len(self.content)
        try:
            while True:
                self.opcode_at = self.position
                if self.position == end:
                    raise self.corrupt("it has no end")
                opcode = content[self.position]
                self.position += 1
                if opcode == _STOP:
                    return self.pop()
                self.left -= 1
                if self.left < 0:
                    self.spend(0)  # it raises
                action = opcodes.get(opcode)
                if action is None:
                    raise self.corrupt(f"{opcode:#04x} is no opcode")
                action(self)
        except Unusable as error:
            raise self.corrupt(str(error)) from error

    # ── errors and budgets ──

    def corrupt(self, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{self.path}: its pickle is broken at byte {self.opcode_at:,}: {problem}. "
            "Download the file again."
        )

    def unsafe(self, problem: str) -> UnsafeCheckpoint:
        return UnsafeCheckpoint(
            f"{self.path}: at byte {self.opcode_at:,} its pickle {problem}, which no weights need. "
            "Nothing was run. Do not trust this file; look for one in safetensors format."
        )

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise CheckpointLimit(
                f"{self.path}: its pickle takes more than {self.limits.opcodes:,} steps, which no "
                "weights do. Pass other limits if you trust it."
            )

    # ── bytes, stack, memo ──

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.content):
            raise self.corrupt(f"it ends {end - len(self.content):,} bytes too early")
        self.position, begin = end, self.position
        return self.content[begin:end]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self, encoding: str = "utf-8") -> str:
        end = self.content.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            raise self.corrupt("a line has no end")
        return self.text(self.take(end + 1 - self.position)[:-1], encoding)

    def text(self, content: bytes, encoding: str = "utf-8", errors: str = "strict") -> str:
        try:
            return content.decode(encoding, errors)
        except UnicodeDecodeError as error:
            raise self.corrupt(f"a text is not {encoding}") from error

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise self.corrupt("the stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise self.corrupt("the stack is empty")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.marked:
            raise self.corrupt("there is no mark")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def put(self, index: int) -> None:
        if not 0 <= index <= self.limits.opcodes:
            raise CheckpointLimit(
                f"{self.path}: at byte {self.opcode_at:,} its pickle asks for a memo of "
                f"{printable(index)} entries, more than the {self.limits.opcodes:,} allowed."
            )
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise self.corrupt(f"the memo has no entry {printable(index)}")
        self.push(self.memo[index])

    # ── parts of opcodes ──

    def name(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.corrupt("a name is not text")
        found = Global(module, name)
        # A dotted name is followed from attribute to attribute, as in attacks on `os.system`.
        if "." in name and not is_inert(found):
            raise self.unsafe(f"reaches for {printable(str(found))}")
        return found

    def call(self, function: Any, arguments: Any) -> None:
        result = call(function, arguments, self.spend)
        if result is None:
            name = str(function) if isinstance(function, Global) else type(function).__name__
            raise self.unsafe(f"calls {printable(name)}")
        self.push(result)

    def set_items(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise self.corrupt(f"items are set in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2]):
            target[dictionary_key(key)] = value

    def extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, Placeholder):
            return
        if not isinstance(target, list):
            raise self.corrupt(f"items are appended to a {type(target).__name__}")
        target += items

    def build(self, target: Any, state: Any) -> None:
        if isinstance(state, dict) and "__setstate__" in state:
            raise self.unsafe("replaces how an object restores itself")
        if isinstance(target, Placeholder):
            target.state = state
        elif not isinstance(
            target, dict
        ):  # the attributes of OrderedDicts, `_metadata`, are dropped
            what = str(target) if isinstance(target, Global) else type(target).__name__
            raise self.unsafe(f"restores the state of {printable(what)}")
