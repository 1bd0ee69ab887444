"""Mutated checkpoints, metadata and sidecars: read and right, or refused in one line.

Nothing is executed or written meanwhile, and a read stays within 1 GiB of memory. `make soak` runs
the long form, from other seeds, and prints how many mutations there were and what became of them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import resource
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from tests.trainer.samples import base_package_payload, save_student
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.metadata import metric_of, run_settings_of, summary, tokens_of
from trainer.checkpoints.reading import read_checkpoint
from trainer.checkpoints.sidecar import SIDECAR_LIMIT, Sidecar
from trainer.runtime.errors import CheckpointError
from trainer.training.progress import Progress

SHORT = 150
"""Mutations of each kind in `make test`."""

SOAK_SECONDS = 75.0
"""For each kind, in `make soak`."""

# ── what a read must not do

_FORBIDDEN = ("os.", "subprocess.", "shutil.", "socket.", "pty.", "exec", "ctypes.", "pickle.")
_HARMLESS = ("os.listdir", "os.scandir", "os.walk")

_seen: list[str] | None = None
"""Forbidden events of the read that is under way."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None or event in _HARMLESS:
        return
    if event == "open":
        flags = arguments[2]
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _seen.append(f"open {arguments[0]!r}")
    elif event == "exec" and os.path.isfile(getattr(arguments[0], "co_filename", "")):
        return  # a module that is imported when it is first needed
    elif event.startswith(_FORBIDDEN):
        _seen.append(f"{event} {arguments!r}")


sys.addaudithook(_watch)


@contextlib.contextmanager
def limited(directory: Path) -> Iterator[None]:
    """Nothing executed, nothing written, at most 1 GiB more memory."""
    global _seen
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = sorted(os.listdir(directory))
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    _seen = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        seen, _seen = _seen, None
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert seen == []
    assert sorted(os.listdir(directory)) == before


def outcome(path: Path, use: Callable[[], None], name: str) -> str:
    """``read``, or the kind of refusal; anything else than one line about the file is an error."""
    with limited(path.parent):
        try:
            use()
        except CheckpointError as error:
            message = str(error)
        else:
            return "read"
    assert message.isprintable(), message
    assert len(message) < 600, message
    assert name in message, message
    return "refused"


# ── what is right


def use_checkpoint(path: Path) -> None:
    """Read a file and ask for all that a command asks of it."""
    read = read_checkpoint(path)
    claimed = 0
    for tensor in read.weights.values():
        assert tensor.dtype.is_floating_point
        assert tensor.device.type == "cpu"
        assert bool(torch.isfinite(tensor.float()).all())
        claimed += tensor.numel() * tensor.element_size()
    assert claimed <= 2 * path.stat().st_size
    assert type(read.step) is int
    assert read.step >= 0
    use_meta(read.meta, path.name)
    progress = Progress.load(read.trainer_state)
    assert -1 <= progress.best_step <= read.step
    assert progress.best_value >= 0.0
    scale = read.trainer_state.get("loss_scale")
    if scale:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(1))
        scaler.load_state_dict(scale)
        assert math.isfinite(scaler.get_scale())
    use_student(read)
    for moments in read.optimizer_by_name().values():
        for value in moments.values():
            assert bool(torch.isfinite(torch.as_tensor(value, dtype=torch.float32)).all())


def use_student(read: Checkpoint) -> None:
    config = read.student_config(None if "model" in read.meta else 4)
    assert config.d_model % config.n_heads == 0
    trained = read.trained_positions()
    assert trained is None or 1 <= trained <= config.positions


def use_meta(meta: dict[str, Any], name: str) -> None:
    """Metadata is plain, can be written again, and tells what commands ask of it."""
    data = Sidecar(name, 1, "AAAA", {"step": 0, "metrics": {}} | meta).dump()
    assert len(data) < SIDECAR_LIMIT
    Sidecar.parse(data, name)
    summary(meta)
    tokens_of(meta)
    metric_of(meta, "val_loss_student")
    if "settings" in meta:
        with contextlib.suppress(CheckpointError):
            run_settings_of(meta)


# ── valid files


@cache
def valid_payloads() -> list[dict[str, Any]]:
    """A run's snapshot, the base package's checkpoint and a bare state dict."""
    buffer = io.BytesIO()
    path = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp") / f"fuzz-{os.getpid()}.pt"
    shapes = {"vocab_size": 64, "d_model": 16, "n_heads": 4, "n_layers": 1}
    save_student(path, **shapes)
    snapshot = torch.load(path, weights_only=True)
    path.unlink()
    path.with_name(path.name + ".meta.json").unlink()
    torch.manual_seed(0)
    base = base_package_payload(trained=24, rows=32, step=9)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    snapshot["trainer_state"] = {
        "best_value": 3.5,
        "best_step": 3,
        "skipped": 1,
        "skipped_in_row": 0,
        "metrics_step": 6,
        "metrics": {"val_loss_student": 3.5, "val_ppl_student": math.inf},
        "first_step": 0,
        "loss_scale": scaler.state_dict(),
    }
    snapshot["meta"] |= {"metrics": {"val_loss_student": 3.5}, "metrics_step": 6}
    snapshot["meta"]["origin"] = {"checkpoint": "x.pt", "step": 4, "block_size": 16, "metrics": {}}
    torch.save(base, buffer)
    return [snapshot, base, dict(snapshot["model"])]


@cache
def valid_archives() -> list[tuple[list[bytes], dict[str, bytes]]]:
    """The opcodes of each payload's pickle, and the other records."""
    made = []
    for payload in valid_payloads():
        buffer = io.BytesIO()
        torch.save(payload, buffer)
        with zipfile.ZipFile(buffer) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        program = records.pop("archive/data.pkl")
        starts = [at for _, _, at in pickletools.genops(program)] + [len(program)]
        opcodes = [program[a:b] for a, b in itertools.pairwise(starts)]
        made.append((opcodes, records))
    return made


def write_archive(path: Path, program: bytes, records: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        archive.writestr("archive/data.pkl", program)
        for name, data in records.items():
            archive.writestr(name, data)


WHICH = st.integers(0, 2)
"""Of the valid files."""

# ── opcode by opcode


def _text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


SNIPPETS = [
    *(bytes([ord(opcode.code)]) for opcode in pickletools.opcodes),
    *(b"c" + name + b"\n" for name in (b"posix\nsystem", b"builtins\neval", b"_codecs\nencode")),
    *(b"c" + name + b"\n" for name in (b"builtins\nbytearray", b"collections\nOrderedDict")),
    *(b"c" + name + b"\n" for name in (b"torch\nSize", b"torch\nfloat8_e4m3fn", b"torch\ndevice")),
    *(b"ctorch\n" + name + b"\n" for name in (b"DoubleStorage", b"QUInt8Storage", b"Tensor")),
    *(
        b"ctorch._utils\n" + name + b"\n"
        for name in (
            *(b"_rebuild_tensor_v3", b"_rebuild_parameter", b"_rebuild_tensor"),
            *(b"_rebuild_sparse_tensor", b"_rebuild_meta_tensor_no_storage"),
        )
    ),
    _text("touch canary") + b"\x85R",
    _text("x" * 70_000),
    b"X\xff\xff\xff\xff",
    b"X\x03\0\0\0\xed\xa0\x80",
    b"(" * 200 + b"t" * 200,
    b"]" * 2000 + b"a" * 1999,
    b")" + b"\x85" * 5000,
    *(b"J" + value.to_bytes(4, "little", signed=True) for value in (-1, 1 << 30, -(1 << 31))),
    *(b"\x8a" + bytes([n]) + b"\xff" * (n - 1) + b"\x7f" for n in (5, 8, 9, 33, 255)),
    b"G\x7f\xf8\0\0\0\0\0\0",
    b"G\x7f\xf0\0\0\0\0\0\0",
    *(b"h" + bytes([index]) for index in (0, 1, 5, 40, 255)),
    b"N",
    b"\x88",
    b"]q\x01h\x01a",
    b"(" + b"h\x01" * 50 + b"t",
    b"}s",
    b"0",
    b"2",
    b".",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
]

EDITS = st.tuples(
    st.sampled_from(["delete", "insert", "replace", "swap", "copy", "repeat", "argument"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 60),
    st.sampled_from(SNIPPETS),
    st.binary(min_size=1, max_size=8),
)


def edited(opcodes: list[bytes], edit: tuple[str, float, float, int, bytes, bytes]) -> list[bytes]:
    kind, first, second, count, snippet, data = edit
    at, other = int(first * len(opcodes)), int(second * len(opcodes))
    changed = list(opcodes)
    if kind == "delete":
        del changed[at : at + count]
    elif kind == "insert":
        changed.insert(at, snippet)
    elif kind == "replace":
        changed[at] = snippet
    elif kind == "swap":
        changed[at], changed[other] = changed[other], changed[at]
    elif kind == "copy":
        changed[other:other] = changed[at : at + count]
    elif kind == "repeat":
        changed[at:at] = changed[at : at + 3] * count * count
    elif kind == "argument":
        changed[at] = (
            changed[at][:1] + (data + changed[at][1 + len(data) :])[: len(changed[at]) - 1]
        )
    return changed or [b"."]


def mutate_pickle(draw: st.DrawFn, path: Path) -> str:
    opcodes, records = valid_archives()[draw(WHICH)]
    for edit in draw(st.lists(EDITS, min_size=1, max_size=4)):
        opcodes = edited(opcodes, edit)
    write_archive(path, b"".join(opcodes), records)
    return outcome(path, lambda: use_checkpoint(path), path.name)


# ── field by field of the archive


def mutate_archive(draw: st.DrawFn, path: Path) -> str:
    buffer = io.BytesIO()
    torch.save(valid_payloads()[draw(WHICH)], buffer)
    data = bytearray(buffer.getvalue())
    signs = [b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"]
    fields = st.tuples(
        st.sampled_from(signs),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 56),
        st.sampled_from([1, 2, 4, 8]),
        st.sampled_from([0, 1, 2, 8, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63, 2**64 - 1]),
        st.sampled_from(["set", "add", "subtract"]),
    )
    for sign, where, offset, length, value, how in draw(st.lists(fields, min_size=1, max_size=3)):
        found = [at for at in range(len(data)) if data.startswith(sign, at)] or [0]
        at = found[int(where * len(found))] + offset
        old = int.from_bytes(data[at : at + length], "little")
        new = {"set": value, "add": old + value, "subtract": old - value}[how] % (1 << 8 * length)
        data[at : at + length] = new.to_bytes(length, "little")
    if draw(st.booleans()):
        cut = draw(st.integers(0, len(data)))
        data = data[:cut] + draw(st.sampled_from([b"", bytes(64), bytes(data[cut : cut + 500])]))
    path.write_bytes(bytes(data))
    return outcome(path, lambda: use_checkpoint(path), path.name)


# ── field by field of the content

HOSTILE: list[Any] = [
    *(None, True, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, math.nan, math.inf),
    *("", "x", "0", "nan", "1e999", "a\nb", "\x1b[31m", "x" * 5000, "../../x", "\ud800"),
    *(1e300, 1e39, -1e-300, 2**31 - 1),
    *([], [1], {}, {"a": 1}, {"": {}}, [[[[]]]], ["x"] * 3000, {"step": -1}),
]

TENSORS: list[Any] = [
    *(torch.zeros(3), torch.zeros(()), torch.full((64, 16), math.nan), torch.zeros(0, 16)),
    *(torch.zeros(64, 16, dtype=torch.int64), torch.zeros(16).to(torch.float8_e5m2)),
    *(torch.zeros(16, 64).T, torch.full((16,), 1e300, dtype=torch.float64), torch.ones(16).half()),
    *(torch.zeros(4, device="meta"), torch.full((16,), -math.inf), torch.ones(64, 16) * 1j),
    *({1: 2}, (1, 2), {"a": torch.zeros(2)}, {1 << 70: 1}),
]


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of nested dicts and lists."""
    found = [at] if at else []
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    if isinstance(tree, dict | list):
        for key, value in entries:
            found += places(value, (*at, key)) if isinstance(value, dict | list) else [(*at, key)]
    return found


def change(tree: Any, place: tuple[Any, ...], how: str, value: Any) -> None:
    """Change what an earlier change has left there, if anything."""
    *way, last = place
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for key in way:
            tree = tree[key]
        old = tree[last]
        if how == "set" or not isinstance(tree, dict):
            tree[last] = value
        else:
            del tree[last]
            if how == "rename":
                tree[value if isinstance(value, str | int) else "x"] = old


def hostile_changes(tree: Any, values: list[Any]) -> st.SearchStrategy[Any]:
    ways = st.sampled_from(["set", "set", "set", "drop", "rename"])
    one = st.tuples(st.sampled_from(places(tree)), ways, st.integers(0, len(values) - 1))
    return st.lists(one, min_size=1, max_size=3)


def mutate_content(draw: st.DrawFn, path: Path) -> str:
    payload = copy.deepcopy(valid_payloads()[draw(WHICH)])
    if "model" in payload and draw(st.booleans()):
        payload.pop(draw(st.sampled_from(["optimizer", "scheduler"])), None)
    payload = {key: dict(v) if isinstance(v, dict) else v for key, v in payload.items()}
    values = HOSTILE + TENSORS
    for where, how, index in draw(hostile_changes(payload, values)):
        change(payload, where, how, copy.deepcopy(values[index]))
    buffer = io.BytesIO()
    try:
        torch.save(payload, buffer)
    except (UnicodeError, pickle.PicklingError, NotImplementedError):
        return "not written"
    path.write_bytes(buffer.getvalue())
    return outcome(path, lambda: use_checkpoint(path), path.name)


# ── field by field of the sidecar


def mutate_sidecar(draw: st.DrawFn, path: Path) -> str:
    meta = valid_payloads()[0]["meta"]
    content = json.loads(Sidecar("best.pt", 123, "AAAA", meta).dump())
    for where, how, index in draw(hostile_changes(content, HOSTILE)):
        change(content, where, how, copy.deepcopy(HOSTILE[index]))
    data = bytearray(json.dumps(content).encode())
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        piece = draw(
            st.sampled_from(
                [b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\xff", b'"', b"NaN", b","]
            )
            | st.binary(max_size=4)
        )
        data[at : at + draw(st.integers(0, 4))] = piece

    def use() -> None:
        read = Sidecar.parse(bytes(data), "best.pt")
        assert read.step >= 0
        assert read.size >= 0
        assert all(isinstance(value, int | float) for value in read.metrics.values())
        use_meta(read.meta, "best.pt")

    return outcome(path, use, "best.pt")


# ── the two forms

MUTATIONS: dict[str, Callable[[st.DrawFn, Path], str]] = {
    "pickle": mutate_pickle,
    "archive": mutate_archive,
    "content": mutate_content,
    "sidecar": mutate_sidecar,
}


def fuzz(name: str, directory: Path, number: int, examples: int) -> Counter[str]:
    """Run mutations of one kind from a seed; returns how many ended how."""
    ended: Counter[str] = Counter()
    mutate = MUTATIONS[name]
    path = directory / "fuzzed.pt"
    path.touch()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        ended[mutate(data.draw, path)] += 1

    run()
    return ended


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_read_and_right_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    ended = fuzz(name, tmp_path, 0, SHORT)
    print(name, dict(ended))
    assert ended["refused"] > SHORT // 4, "the mutations bite"


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_for_minutes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: Counter[str] = Counter()
    end, number = time.monotonic() + SOAK_SECONDS, 0
    while time.monotonic() < end:
        number += 1
        ended += fuzz(name, tmp_path, number, 500)
    with capsys.disabled():
        print(f"\n{name}: {sum(ended.values())} mutations from {number} seeds: {dict(ended)}")
    assert ended["refused"]
