"""Stored targets, damaged field by field and byte by byte: served as made, or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from tests.fuzz.runs import bounded_memory, contents, one_line, run_property
from trainer.runtime.errors import LiquidError
from trainer.storage.files import crc32c_of_bytes
from trainer.targets import making, shards
from trainer.targets.reading import Targets
from trainer.targets.shards import ESTIMATOR, Index, MadeWith, dump_description, read_index

MADE = MadeWith(
    tokens="0123456789abcdef01234567",
    tokenizer="76543210fedcba9876543210",
    train_tokens=40,
    validation_tokens=9,
    teacher="some/teacher",
    teacher_digest="commit 0123456789",
    teacher_precision="bfloat16",
    vocabulary=512,
    teacher_context=8,
    temperatures=(1.0, 1.2),
    record_bytes=24,
    seed=42,
    estimator=ESTIMATOR,
    contexts=(4, 8),
)

SHARD_BYTES = 2 * 8 * 24
"""Of two windows."""

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 7, 9, 23, 25, 39, 41, 513, -1, 2**24, 2**31, 2**32, 2**48, 2**63, 10**30, 10**400]
)
ODD: st.SearchStrategy[Any] = (
    NUMBERS
    | st.booleans()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["", "../..", "x" * 5000, "float32", "\0", "\ud800", [1.0], [1.0, 1.0], [2, 1]]
    )
    | st.none()
    | st.lists(NUMBERS | st.floats(), max_size=3)
    | st.dictionaries(st.text(max_size=5), st.integers(), max_size=3)
)
PLACES = st.sampled_from(
    [
        *("", ".", "/", "..", "../train-00000.bin", "/etc/passwd", "/dev/zero", "train-00000.bin"),
        *("/tmp/../train-00000.bin", "gs://bucket/../train-00000.bin", "gs:///train-00000.bin"),
        *("file:///train-00000.bin", "/train-00001.bin", "//train-00000.bin", "gs://b/x"),
        *("/dev/fd/0/train-00000.bin", "\0/train-00000.bin", "~/train-00000.bin", 5, None, ["/"]),
    ]
)
FILES = st.sampled_from(["train-00000.bin", "train-00001.bin", "train-00002.bin", "validation.bin"])
JSONS = st.sampled_from(["targets.json", "train-00000.json", "validation.json"])
FIELDS = st.sampled_from([*asdict(MADE), "more", "", "__class__", "digest", "layout"])

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), FIELDS, ODD),
        st.tuples(st.just("remove"), FIELDS, st.none()),
        st.tuples(st.just("top"), st.sampled_from(["format", "made_with", "files", "x"]), ODD),
        st.tuples(st.just("fingerprint"), st.just(""), ODD),
        st.tuples(st.just("at"), FILES, PLACES),
        st.tuples(st.just("sum"), FILES, ODD),
        st.tuples(st.just("entry"), FILES, ODD),
        st.tuples(st.just("nest"), st.just(""), st.sampled_from([10, 990, 5000, 200_000])),
        st.tuples(st.just("text byte"), JSONS, st.tuples(st.integers(0, 900), st.binary())),
        st.tuples(st.just("text cut"), JSONS, st.integers(0, 900)),
        st.tuples(st.just("byte"), FILES, st.tuples(st.integers(0, 400), st.integers(0, 7))),
        st.tuples(st.just("record"), FILES, st.tuples(st.integers(0, 191), st.integers(0, 255))),
        st.tuples(st.just("size"), FILES, st.sampled_from([0, 1, 195, 391, 393, 1 << 33])),
        st.tuples(st.just("absent"), FILES, st.none()),
        st.tuples(st.just("directory"), FILES, st.none()),
        st.tuples(st.just("swap"), FILES, FILES),
    ),
    min_size=1,
    max_size=3,
)


def whole_files() -> dict[str, bytes]:
    """Records of no meaning, with ids that are in range."""
    random = np.random.default_rng(5)
    files = {}
    for number in range(MADE.shards):
        data = b""
        for window in MADE.windows_of(number):
            rows = random.integers(0, 256, (len(MADE.places_of(window)), 24), dtype=np.uint8)
            layout = MADE.layout
            start = layout._front_bytes
            rows[:, start + 1 : start + 2 * layout.places : 2] &= 1  # high bytes: below 512
            data += rows.tobytes() + MADE.checksum(window, rows.tobytes())
        files[shards.shard_name(number)] = data
    losses = -random.random((2, 8)).astype("<f4")
    return files | {"validation.bin": losses.tobytes()}


def write_whole(directory: Path) -> dict[str, bytes]:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    files = whole_files()
    assert {name: len(data) for name, data in files.items()} == MADE.files
    for name, data in files.items():
        (directory / name).write_bytes(data)
        described = dump_description(MADE, name, crc32c_of_bytes(data))
        (directory / shards.description_name(name)).write_bytes(described)
    at = {name: (str(directory / name), crc32c_of_bytes(data)) for name, data in files.items()}
    (directory / "targets.json").write_bytes(Index(MADE, at).dump(str(directory)))
    return files


def change(directory: Path, kind: str, name: str, value: Any) -> None:
    index = directory / "targets.json"
    if kind in ("set", "remove", "top", "fingerprint", "at", "sum", "entry", "nest"):
        change_index(index, kind, name, value)
        return
    path = directory / name
    if not path.is_file():
        return
    data = path.read_bytes() if path.stat().st_size < 1 << 20 else b""
    if kind == "text byte":
        path.write_bytes(data[: value[0]] + value[1] + data[value[0] + 1 :])
    elif kind == "text cut":
        path.write_bytes(data[:value])
    elif kind == "byte" and data:
        at = value[0] % len(data)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << value[1]]) + data[at + 1 :])
    elif kind == "record" and len(data) > 196 and name != "validation.bin":
        # With its right checksum, as whoever wants to do harm would write it
        window = MADE.windows_of(shards.shard_number(name) or 0)[0]
        records = data[: value[0]] + bytes([value[1]]) + data[value[0] + 1 : 192]
        path.write_bytes(records + MADE.checksum(window, records) + data[196:])
    elif kind == "size":
        with path.open("ab") as file:
            file.truncate(value)  # holes take no space
    elif kind in ("absent", "directory"):
        path.unlink()
        if kind == "directory":
            path.mkdir()
    elif kind == "swap" and (directory / value).is_file():
        other = (directory / value).read_bytes()
        (directory / value).write_bytes(data)
        path.write_bytes(other)


def change_index(path: Path, kind: str, name: str, value: Any) -> None:
    try:
        content = json.loads(path.read_bytes())
        if kind == "set":
            content["made_with"][name] = value
        elif kind == "remove":
            content["made_with"].pop(name, None)
        elif kind in ("top", "fingerprint"):
            content[name or "fingerprint"] = value
        elif kind == "at":
            content["files"][name]["at"] = value
        elif kind == "sum":
            content["files"][name]["crc32c"] = value
        elif kind == "entry":
            content["files"][name] = value
        if kind != "fingerprint":
            content["fingerprint"] = fingerprint(content, path)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, LiquidError):
        if kind != "nest" and not path.read_bytes().startswith(b"{"):
            return
        content = {}
    text = json.dumps(content)
    if kind == "nest":
        text = f'{text[:-1]}, "x": {"[" * value}{"]" * value}}}'
    path.write_text(text)


def fingerprint(content: dict[str, Any], path: Path) -> str:
    """As of an index that holds together, which whoever wants to do harm would write."""
    made = dict(content["made_with"])
    made |= {name: tuple(made[name]) for name in ("temperatures", "contexts")}
    files = {name: (entry["at"], entry["crc32c"]) for name, entry in content["files"].items()}
    return Index(MadeWith(**made), files).fingerprint


def served(directory: Path) -> dict[int, bytes]:
    """Every window that can be read, by its number."""
    index = read_index(str(directory))
    targets = Targets(index, index.made.teacher_context, 0, directory.parent / "w", copying=True)
    try:
        assert all(0.0 <= loss < np.inf for loss in targets.losses.values())
        whole = index.made.places // index.made.teacher_context
        numbers = [np.array([number]) for number in range(min(whole, 8))]
        found = targets.batches(numbers, pinned=False)
        rows = dict(enumerate(found))
        for records in rows.values():
            for temperature in index.made.temperatures:
                decoded = index.made.layout.decode(records[0], temperature)
                assert bool(torch.isfinite(decoded.weights).all())
                assert int(decoded.ids.max()) < index.made.vocabulary
                assert int(decoded.ids.min()) >= 0
        return {number: records.numpy().tobytes() for number, records in rows.items()}
    finally:
        targets.close()


def check(directory: Path, changes: list[tuple[str, Any, Any]]) -> bool:
    """Whether it was accepted."""
    files = write_whole(directory)
    for kind, name, value in changes:
        change(directory, kind, name, value)
    before = contents(directory)
    accepted = True
    try:
        found = served(directory)
    except LiquidError as error:
        one_line(error)
        accepted = False
    else:
        whole = b"".join(files[shards.shard_name(n)] for n in range(MADE.shards))
        for number, records in found.items():
            kept = whole[number * 196 : number * 196 + 192]
            assert records == kept or any(kind == "record" for kind, *_ in changes)
    try:
        index = making.join(str(directory.parent / "joined"), [str(directory)])
        assert index.made.files.keys() == index.files.keys()
    except LiquidError as error:
        one_line(error)
    finally:
        shutil.rmtree(directory.parent / "joined", ignore_errors=True)
    assert contents(directory) == before
    return accepted


@pytest.fixture
def property_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], bool]:
    monkeypatch.setattr(shards, "_SHARD_BYTES", SHARD_BYTES)
    assert MADE.shards == 3
    return lambda changes: check(tmp_path / "targets", changes)


def test_whole_targets_are_accepted(property_of: Callable[[Any], bool]) -> None:
    assert property_of([])


def test_damaged_targets(property_of: Callable[[Any], bool]) -> None:
    with bounded_memory():
        run_property(property_of, CHANGES, examples=60)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_damaged_targets_for_long(property_of: Callable[[Any], bool]) -> None:
    with bounded_memory():
        run_property(property_of, CHANGES, examples=8000)
