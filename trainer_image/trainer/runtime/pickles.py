"""What a checkpoint's pickle may hold, decided before anything is built from it.

A pickle is a program. A few kilobytes of it can stand for gigabytes (references to groups of
references), keep a text codec busy for hours, or nest so deeply that hashing a key or freeing a
list ends the interpreter. So its opcodes are walked first, by a machine that keeps a small summary
of each value and builds none: only what `torch.save` writes for dicts, lists, tuples, texts,
numbers and tensors passes, within bounds that a run's checkpoint keeps. A tensor must lie within a
storage, and a storage within its record of the archive: torch takes their sizes on trust.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.runtime.errors import CheckpointError
from trainer.runtime.limits import TEXT_LIMIT

PICKLE_LIMIT = 16 << 20
"""Bytes; that of a student of 100 blocks has about one MiB, and long schedules add another."""

_OPCODES, _TENSORS = 1_000_000, 50_000
"""A student of 512 blocks with its moments takes about 900,000 and 25,000."""

_SIZE, _DEPTH, _LONG = 32 << 20, 32, 32
"""Of a value: bytes with each reference counted in full, levels; bytes of a whole number."""

_ITEM = 8
"""Bytes that a value counts beside its text and parts."""

_STORAGES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
}
"""Bytes of an element."""

_NOT_DENSE = ("_rebuild_sparse_tensor", "_rebuild_nested_tensor", "_rebuild_qtensor")


@dataclass(slots=True)
class _Value:
    """A summary of a value on the stack."""

    kind: str
    data: Any = None
    """A number, a text, a tuple's parts, the last key of a dict, (elements, bytes each) of a
    storage, the function's name or an element's bytes of a global."""
    size: int = _ITEM
    depth: int = 0
    count: int = 0
    """Entries of a dict."""
    closed: bool = False
    """Whether it has been put into another value or referred to; it cannot change any more."""


def _known_globals() -> dict[str, _Value]:
    known = {
        f"torch.{name}": _Value("dtype", value.itemsize)
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    }
    known |= {f"torch.{name}": _Value("storage type", size) for name, size in _STORAGES.items()}
    known["torch.storage.UntypedStorage"] = _Value("storage type", 1)
    functions = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
    for name in (*functions, "_rebuild_meta_tensor_no_storage"):
        known[f"torch._utils.{name}"] = _Value("function", name)
    for name in ("collections.OrderedDict", "torch.Size", "torch.device"):
        known[name] = _Value("function", name.rpartition(".")[2])
    return known


_GLOBALS = _known_globals()

_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


class _Refusal(Exception):
    """Why a pickle is refused: the end of a sentence about its file."""


def check_pickle(program: bytes, records: Mapping[str, int], source: str) -> None:
    """Refuse a pickle that `torch.save` would not have written for a checkpoint.

    Args:
        program: the pickle.
        records: name and bytes of the archive's records, without the archive's own directory.
        source: what messages call the file.

    Raises:
        CheckpointError: naming what does not belong into a checkpoint.
    """
    try:
        _Machine(program, records).run()
    except _Refusal as refusal:
        raise CheckpointError(f"{source} {refusal}") from None


def _unreadable(what: str) -> _Refusal:
    return _Refusal(f"cannot be read as a checkpoint: {what}")


def _too_large(what: str) -> _Refusal:
    return _Refusal(
        f"is refused: what it holds beside its tensors is larger than any run's: {what}"
    )


class _Machine:
    """Walks a pickle as torch's own reader runs it, with summaries in place of values."""

    def __init__(self, program: bytes, records: Mapping[str, int]) -> None:
        self._program = program
        self._records = records
        self._at = 0
        self._stack: list[_Value] = []
        self._below: list[list[_Value]] = []
        """The stacks under the marks."""
        self._memo: dict[int, _Value] = {}
        self._types: dict[str, int] = {}
        """Bytes of an element by record: torch reads each storage once, by its first type."""
        self._tensors = 0

    def run(self) -> None:
        if self._take(2) != pickle.PROTO + b"\x02":
            raise _unreadable("its pickle is not of protocol 2, in which torch.save writes")
        for _ in range(_OPCODES):
            code = self._take(1)[0]
            if code == pickle.STOP[0]:
                self._pop()
                return
            step = _STEPS.get(code)
            if step is None:
                name = _NAMES.get(code, hex(code))
                raise _unreadable(
                    f"its pickle has {name} at byte {self._at - 1}, which torch.save does not write"
                )
            step(self)
        raise _too_large(f"more than {_OPCODES} opcodes")

    # ── reading and the stack

    def _take(self, length: int) -> bytes:
        taken = self._program[self._at : self._at + length]
        if len(taken) < length:
            raise _unreadable("its pickle is cut short")
        self._at += length
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._program.find(b"\n", self._at, self._at + 200)
        if end < 0:
            raise _unreadable("its pickle refers to a name without an end")
        return self._take(end + 1 - self._at)[:-1].decode("utf-8", "backslashreplace")

    def _push(self, kind: str, data: Any = None) -> None:
        self._stack.append(_Value(kind, data))

    def _pop(self, kind: str | None = None) -> _Value:
        if not self._stack:
            raise _unreadable("its pickle takes more than it has put")
        value = self._stack.pop()
        if kind is not None and value.kind != kind:
            raise _unreadable(f"its pickle has a {value.kind} where a {kind} is needed")
        return value

    def _pop_to_mark(self) -> list[_Value]:
        if not self._below:
            raise _unreadable("its pickle takes more than it has put")
        items, self._stack = self._stack, self._below.pop()
        return items

    def _grow(self, value: _Value, parts: Sequence[_Value]) -> None:
        """Put parts into a value that is still open."""
        if value.closed:
            raise _too_large("a value that refers to itself")
        for part in parts:
            part.closed = True
            value.size += part.size
            value.depth = max(value.depth, part.depth + 1)
        if value.size > _SIZE:
            raise _too_large(f"a value of more than {_SIZE >> 20} MiB")
        if value.depth > _DEPTH:
            raise _too_large(f"values nested more than {_DEPTH} deep")

    # ── opcodes

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _get(self, form: str) -> None:
        value = self._memo.get(self._number(form))
        if value is None:
            raise _unreadable("its pickle refers to what it has not put")
        value.closed = True
        self._stack.append(value)

    def _put(self, form: str) -> None:
        index = self._number(form)
        if not self._stack:
            raise _unreadable("its pickle takes more than it has put")
        self._memo[index] = self._stack[-1]

    def _text(self) -> None:
        length = self._number("<I")
        if length > TEXT_LIMIT:
            raise _too_large(f"a text of {length} bytes")
        try:
            text = str(self._take(length), "utf-8")
        except UnicodeDecodeError:
            raise _unreadable("its pickle has a text that is not UTF-8") from None
        self._stack.append(_Value("text", text, _ITEM + length))

    def _long(self) -> None:
        length = self._number("<B")
        if length > _LONG:
            raise _too_large(f"a number of {length} bytes")
        self._push("number", pickle.decode_long(self._take(length)))

    def _global(self) -> None:
        name = f"{self._line()}.{self._line()}"
        value = _GLOBALS.get(name)
        if value is not None:
            self._stack.append(value)
            return
        shown = "".join(letter if letter.isprintable() else "?" for letter in name)[:100]
        if name.removeprefix("torch._utils.") in _NOT_DENSE:
            raise _Refusal(f"is refused: it holds a tensor by {shown}, not a dense float one")
        raise _unreadable(f"it refers to {shown}, which could run code")

    def _tuple(self, length: int | None) -> None:
        if length is None:
            parts = self._pop_to_mark()
        else:
            parts = [self._pop() for _ in range(length)][::-1]
        value = _Value("tuple", parts)
        self._grow(value, parts)
        self._stack.append(value)

    def _append(self, *, many: bool) -> None:
        parts = self._pop_to_mark() if many else [self._pop()]
        target = self._pop("list")
        self._grow(target, parts)
        self._stack.append(target)

    def _set(self, *, many: bool) -> None:
        parts = self._pop_to_mark() if many else [self._pop(), self._pop()][::-1]
        target = self._pop("dict")
        if len(parts) % 2:
            raise _unreadable("its pickle has a key without a value")
        for key in parts[::2]:
            # Larger numbers could be chosen to have one hash
            if key.kind != "text" and (
                key.kind != "number" or not -(1 << 31) <= key.data < 1 << 31
            ):
                raise _unreadable(f"its pickle has a {key.kind} as a key")
            target.data = key.data
        target.count += len(parts) // 2
        self._grow(target, parts)
        self._stack.append(target)

    def _build(self) -> None:
        """A module's state dict has its version as ``_metadata``; nothing else has a state."""
        state, target = self._pop("dict"), self._pop("dict")
        if (state.count, state.data) != (1, "_metadata"):
            raise _unreadable("its pickle sets the state of a value that needs none")
        self._grow(target, [state])
        self._stack.append(target)

    def _storage(self) -> None:
        parts = self._pop("tuple").data
        kinds = ["text", "storage type", "text", "text", "number"]
        if [part.kind for part in parts] != kinds or parts[0].data != "storage":
            raise _unreadable("its pickle has an outside value that is no storage")
        _, element, record, _, count = (part.data for part in parts)
        held = self._records.get(f"data/{record}")
        if held is None or not 0 <= count * element <= held:
            raise _unreadable(
                f"a storage of {count * element} bytes has a record of {held or 0} bytes"
            )
        if self._types.setdefault(record, element) != element:
            raise _unreadable("a storage is of two types")
        self._push("storage", (count, element))

    def _reduce(self) -> None:
        arguments, function = self._pop("tuple").data, self._pop("function").data
        kinds = [argument.kind for argument in arguments]
        if function == "OrderedDict" and not kinds:
            self._push("dict")
        elif function == "Size" and kinds == ["tuple"]:
            self._stack.append(_Value("size", None, arguments[0].size, arguments[0].depth))
        elif function == "device" and kinds in (["text"], ["text", "number"]):
            self._push("device")
        elif function == "_rebuild_parameter" and kinds == ["tensor", "bool", "dict"]:
            self._tensor(arguments[2])
        elif function == "_rebuild_meta_tensor_no_storage" and kinds == [
            *("dtype", "tuple", "tuple", "bool"),
        ]:
            _extents(arguments[1], arguments[2])
            self._tensor(None)
        elif function.startswith("_rebuild_tensor_v"):
            self._rebuild(function, arguments, kinds)
        else:
            raise _unreadable(f"its pickle calls {function} with other values than torch.save does")

    def _rebuild(self, function: str, arguments: Sequence[_Value], kinds: list[str]) -> None:
        """A tensor on a storage."""
        dtype = ["dtype"] if function == "_rebuild_tensor_v3" else []
        if kinds != ["storage", "number", "tuple", "tuple", "bool", "dict", *dtype]:
            raise _unreadable("its pickle has a tensor of other parts than torch.save writes")
        count, element = arguments[0].data
        if dtype:
            count = count * element // arguments[6].data
        offset = arguments[1].data
        elements, reach = _extents(arguments[2], arguments[3])
        if elements > count or offset < 0 or (elements and offset + reach > count):
            raise _unreadable(
                f"a tensor of {elements} elements claims more elements than it holds:"
                f" its storage has {count}"
            )
        self._tensor(arguments[5])

    def _tensor(self, hooks: _Value | None) -> None:
        if hooks is not None and (hooks.count or hooks.size != _ITEM):
            raise _unreadable("its pickle has a tensor with hooks")
        self._tensors += 1
        if self._tensors > _TENSORS:
            raise _too_large(f"more than {_TENSORS} tensors")
        self._push("tensor")


def _extents(size: _Value, stride: _Value) -> tuple[int, int]:
    """How many elements a tensor has, and how many its storage must have from its offset on."""
    lengths = [part.data for part in size.data]
    steps = [part.data for part in stride.data]
    whole = all(part.kind == "number" and part.data >= 0 for part in (*size.data, *stride.data))
    if not whole or len(lengths) != len(steps) or len(lengths) > 64:
        raise _unreadable("its pickle has a tensor whose shape is none")
    reach = 1 + sum((length - 1) * step for length, step in zip(lengths, steps, strict=True))
    return math.prod(lengths), reach


_Step = Callable[[_Machine], None]

_STEPS: dict[int, _Step] = {
    pickle.MARK[0]: _Machine._mark,
    pickle.NONE[0]: lambda m: m._push("none"),
    pickle.NEWTRUE[0]: lambda m: m._push("bool", True),
    pickle.NEWFALSE[0]: lambda m: m._push("bool", False),
    pickle.BININT[0]: lambda m: m._push("number", m._number("<i")),
    pickle.BININT1[0]: lambda m: m._push("number", m._number("<B")),
    pickle.BININT2[0]: lambda m: m._push("number", m._number("<H")),
    pickle.BINFLOAT[0]: lambda m: m._push("float", m._number(">d")),
    pickle.LONG1[0]: _Machine._long,
    pickle.BINUNICODE[0]: _Machine._text,
    pickle.EMPTY_TUPLE[0]: lambda m: m._tuple(0),
    pickle.TUPLE1[0]: lambda m: m._tuple(1),
    pickle.TUPLE2[0]: lambda m: m._tuple(2),
    pickle.TUPLE3[0]: lambda m: m._tuple(3),
    pickle.TUPLE[0]: lambda m: m._tuple(None),
    pickle.EMPTY_LIST[0]: lambda m: m._push("list"),
    pickle.APPEND[0]: lambda m: m._append(many=False),
    pickle.APPENDS[0]: lambda m: m._append(many=True),
    pickle.EMPTY_DICT[0]: lambda m: m._push("dict"),
    pickle.SETITEM[0]: lambda m: m._set(many=False),
    pickle.SETITEMS[0]: lambda m: m._set(many=True),
    pickle.BINGET[0]: lambda m: m._get("<B"),
    pickle.LONG_BINGET[0]: lambda m: m._get("<I"),
    pickle.BINPUT[0]: lambda m: m._put("<B"),
    pickle.LONG_BINPUT[0]: lambda m: m._put("<I"),
    pickle.GLOBAL[0]: _Machine._global,
    pickle.REDUCE[0]: _Machine._reduce,
    pickle.BUILD[0]: _Machine._build,
    pickle.BINPERSID[0]: _Machine._storage,
}
