"""Token streams, damaged field by field and byte by byte: served as described, or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from tests.fuzz.runs import bounded_memory, contents, one_line, run_property
from trainer.data.prepared import find_streams
from trainer.data.streams import open_streams, read_info
from trainer.runtime.errors import LiquidError

WHOLE = {
    "train_tokens": 40,
    "validation_tokens": 4,
    "vocab_size": 512,
    "dtype": "uint16",
    "eos_token_id": 0,
    "tokenizer": "some/teacher",
    "dataset": {"name": "x", "config": None, "revision": None, "text_column": "text"},
    "validation_split": "the data set's validation split",
    "fingerprint": "0123456789abcdef01234567",
    "format": 1,
    "tokenizer_fingerprint": "76543210fedcba9876543210",
}

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 39, 41, 80, -1, -40, 2**31, 2**32, 2**40, 2**63, 2**64, 10**30, 10**400, True]
)
ODD: st.SearchStrategy[Any] = (
    NUMBERS
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["uint8", "uint32", "int16", "float32", "O", "U9", "", "../..", "x" * 5000])
    | st.none()
    | st.recursive(st.none() | st.integers(), lambda inner: st.lists(inner) | st.lists(inner))
    | st.dictionaries(st.text(max_size=5), st.integers(), max_size=3)
)
FIELDS = st.sampled_from([*WHOLE, "more", "", "__class__"])
STREAM_NAMES = st.sampled_from(["train.bin", "validation.bin"])


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), FIELDS, ODD),
        st.tuples(st.just("remove"), FIELDS, st.none()),
        st.tuples(st.just("nest"), FIELDS, st.sampled_from([10, 990, 5000, 200_000])),
        st.tuples(st.just("twice"), FIELDS, ODD),
        st.tuples(st.just("byte"), st.integers(0, 600), st.binary(max_size=4)),
        st.tuples(st.just("cut"), st.integers(0, 600), st.none()),
        st.tuples(
            st.just("size"), STREAM_NAMES, st.sampled_from([0, 1, 7, 8, 79, 81, 160, 1 << 33])
        ),
        st.tuples(st.just("ids"), STREAM_NAMES, st.integers(0, 2**32 - 1)),
        st.tuples(st.just("absent"), STREAM_NAMES, st.none()),
        st.tuples(st.just("directory"), STREAM_NAMES, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def write_whole(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    np.arange(40, dtype=np.uint16).tofile(directory / "train.bin")
    np.arange(4, dtype=np.uint16).tofile(directory / "validation.bin")


def described(changes: list[tuple[str, Any, Any]]) -> bytes:
    """The description with what changes its fields, then with what changes its bytes."""
    fields: dict[str, str] = {name: json.dumps(value) for name, value in WHOLE.items()}
    more = ""
    for kind, name, value in changes:
        if kind == "set":
            fields[name] = json.dumps(value)
        elif kind == "nest":
            fields[name] = nested(value)
        elif kind == "remove":
            fields.pop(name, None)
        elif kind == "twice":
            more += f", {json.dumps(name)}: {json.dumps(value)}"
    inner = ", ".join(f"{json.dumps(name)}: {text}" for name, text in fields.items())
    data = f"{{{inner}{more}}}".encode()
    for kind, place, value in changes:
        if kind == "byte":
            data = data[:place] + value + data[place + 1 :]
        elif kind == "cut":
            data = data[:place]
    return data


def change_files(directory: Path, changes: list[tuple[str, Any, Any]]) -> None:
    for kind, name, value in changes:
        if kind not in ("size", "ids", "absent", "directory"):
            continue
        path = directory / name
        if not path.is_file() and kind in ("size", "ids"):
            continue
        if kind == "size":
            with path.open("ab") as file:
                file.truncate(value)  # holes take no space
        elif kind == "ids":
            path.write_bytes(value.to_bytes(4, "little") * (path.stat().st_size % 4096 // 4))
        elif path.is_file():
            path.unlink()
        if kind == "directory":
            path.mkdir(exist_ok=True)


def check(directory: Path, changes: list[tuple[str, Any, Any]]) -> bool:
    """Whether it was accepted."""
    write_whole(directory)
    (directory / "tokens.json").write_bytes(described(changes))
    change_files(directory, changes)
    before = contents(directory)
    try:
        streams = open_streams(directory)
    except LiquidError as error:
        one_line(error)
        accepted = False
    else:
        info = streams.info
        assert info == read_info((directory / "tokens.json").read_bytes(), "")
        assert (len(streams.train), len(streams.validation)) == (
            info.train_tokens,
            info.validation_tokens,
        )
        assert streams.train.dtype == streams.validation.dtype == np.dtype(info.dtype)
        assert int(streams.train[:100].max()) < info.vocab_size
        assert info.eos_token_id < info.vocab_size
        accepted = True
    try:
        assert find_streams(str(directory)) is not None or not (directory / "tokens.json").exists()
    except LiquidError as error:
        one_line(error)
        assert not accepted, "the two readers agree"
    assert contents(directory) == before
    return accepted


@pytest.fixture
def property_of(tmp_path: Path) -> Callable[[Any], bool]:
    return lambda changes: check(tmp_path / "tokens", changes)


def test_whole_streams_are_accepted(property_of: Callable[[Any], bool]) -> None:
    assert property_of([])


def test_damaged_streams(property_of: Callable[[Any], bool]) -> None:
    with bounded_memory():
        run_property(property_of, CHANGES, examples=200)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_damaged_streams_for_long(property_of: Callable[[Any], bool]) -> None:
    with bounded_memory():
        run_property(property_of, CHANGES, examples=8000)
