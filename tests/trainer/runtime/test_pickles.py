"""Pickles that cost more than their size says are refused before anything is built from them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.samples import base_package_payload
from trainer.checkpoints.reading import read_checkpoint
from trainer.models.student import Student, StudentConfig
from trainer.runtime.errors import CheckpointError

SMALL = StudentConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=4, positions=32)

START, STOP = b"\x80\x02", b"."


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def long(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(record: str = "0", kind: str = "FloatStorage", count: int = 4) -> bytes:
    parts = text("storage") + named("torch", kind) + text(record) + text("cpu") + number(count)
    return b"(" + parts + b"tQ"


def tensor(on: bytes, size: bytes, stride: bytes, offset: int = 0, hooks: bytes = b"") -> bytes:
    hooks = hooks or named("collections", "OrderedDict") + b")R"
    parts = on + number(offset) + size + stride + b"\x89" + hooks
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + parts + b"tR"


def one(length: int) -> bytes:
    """A tuple of one number."""
    return number(length) + b"\x85"


def model(value: bytes) -> bytes:
    """``{"model": {"w": value}}``."""
    return b"}" + text("model") + b"}" + text("w") + value + b"ss"


def archive(
    path: Path, program: bytes, records: Mapping[str, bytes] | None = None, prefix: str = "archive"
) -> Path:
    """A file as torch lays it out."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{prefix}/data.pkl", START + program + STOP)
        file.writestr(f"{prefix}/version", "3\n")
        for name, data in (records or {"data/0": bytes(16)}).items():
            file.writestr(f"{prefix}/{name}", data)
    return path


# ── what a checkpoint may hold


def test_what_torch_writes_for_a_run_is_read(tmp_path: Path) -> None:
    weights = Student(SMALL).initialize(0).state_dict()
    assert hasattr(weights, "_metadata"), "a state set on a dict, which is let through"
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    payload = base_package_payload(trained=24, rows=100) | {
        "scaler": scaler.state_dict(),
        "arguments": {
            "device": torch.device("cuda", 0),
            "dtype": torch.bfloat16,
            "size": torch.Size((2, 3)),
            "seed": 2**64 - 1,
            "names": [f"n{i}" for i in range(3000)],
            "table": {f"n{i}": i for i in range(3000)},
            "counts": torch.arange(5),
            "parameter": torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64)),
            "fp8": torch.zeros(4).to(torch.float8_e5m2),
            "nothing": [None, True, (), [], {}, OrderedDict(), torch.zeros(0), torch.zeros(())],
            "view": torch.zeros(8)[1::2],
        },
    }
    torch.save(payload, tmp_path / "base.pt")
    read = read_checkpoint(tmp_path / "base.pt")
    for name, value in payload["model"].items():
        assert torch.equal(read.weights[name], value)
    tied = dict(weights) | {"lm_head.weight": weights["embed.weight"]}
    for name, content in (("bare", weights), ("tied", tied), ("plain", dict(weights))):
        torch.save(content, tmp_path / f"{name}.pt")
        read = read_checkpoint(tmp_path / f"{name}.pt")
        assert read.student_config(n_heads=4) == SMALL
        assert all(torch.equal(read.weights[key], value) for key, value in content.items())
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        torch.save({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "x.pt")
        assert read_checkpoint(tmp_path / "x.pt").student_config(n_heads=4) == SMALL


def test_the_deepest_student_is_read(tmp_path: Path) -> None:
    deep = StudentConfig(vocab_size=4, d_model=2, n_layers=512, n_heads=1, positions=4)
    student = Student(deep).initialize(0)
    optimizer = torch.optim.AdamW(student.parameters())
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    names = list(dict(student.named_parameters()))
    payload = {
        "model": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 1,
        "trainer_state": {"optimizer_names": names},
    }
    torch.save(payload, tmp_path / "deep.pt")
    read = read_checkpoint(tmp_path / "deep.pt")
    assert read.student_config(n_heads=1) == deep
    assert len(read.optimizer_by_name()) == len(names)


# ── the costs


def doubled(levels: int) -> bytes:
    """A list of references to a list of references to …, 100 each."""
    program = b"]" + b"q\0"
    for level in range(1, levels):
        refer = b"h" + bytes([level - 1])
        program += b"](" + refer * 100 + b"e" + b"q" + bytes([level])
    return program


def costly(directory: Path) -> dict[str, Path]:
    """Small files that stand for much; the last one is as large as it says."""
    deep_key = b"}" + b")" + b"\x85" * 300_000 + number(1) + b"s"
    sized = named("builtins", "bytearray") + long(1_500_000_000) + b"\x85R"
    coded = named("_codecs", "encode") + b"(" + text("ä" * 400_000) + text("punycode") + b"tR"
    beside = b"}(" + text("model") + b"}" + text("data") + sized + b"u"
    parts = b"(" + storage() + number(0) + one(4) + one(1) + b"\x89"
    parts += named("collections", "OrderedDict") + b")Rtq\1"
    rebuild = named("torch._utils", "_rebuild_tensor_v2") + b"q\0"
    wide = b"(" + named("torch", "Size") + b"(" + number(1) * 900_000 + b"t\x85R"
    programs = {
        "references to groups of references": model(doubled(9)),
        "references in metadata": b"}" + text("meta") + b"}" + text("a") + doubled(12) + b"ss",
        "references as a key": b"}" + doubled(6) + number(1) + b"s",
        "text codec": coded,
        "deep key": deep_key,
        "deep list": b"]" * 400_000 + b"a" * 399_999,
        "bytearray": beside,
        "set": named("builtins", "set") + b"(lq\0\x85R",
        "many opcodes": b"(" + b"N" * 3_000_000 + b"t",
        "many tensors": b"(" + rebuild + parts + b"R" + b"h\0h\1R" * 60_000 + b"t",
        "long number": b"\x8a\xff" + b"\x01" * 255,
        "long text": text("x" * (3 << 20)),
        "old text opcodes": b"V" + b"x" * 1_000_000 + b"\n",
        "marks": b"(" * 500_000,
        "wide": wide,
        "digits": b"I" + b"9" * 1_000_000 + b"\n",
        "elements": model(tensor(storage(count=1 << 30), one(1 << 30), one(1))),
    }
    return {name: archive(directory / f"{name}.pt", made) for name, made in programs.items()}


CHILD = """
import os, resource, sys
from pathlib import Path
from trainer.checkpoints.reading import read_checkpoint
from trainer.runtime.errors import LiquidError
import torch
torch.set_num_threads(1)
for path in map(Path, sys.argv[1:]):
    print(path.stem, end=": ", flush=True)
    child = os.fork()
    if not child:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        room = used + (1 << 30) + path.stat().st_size
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CPU, (10 + sum(os.times()[:2]).__ceil__(),) * 2)
        try:
            read_checkpoint(path).student_config(n_heads=4)
            print("accepted", flush=True)
        except LiquidError as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        print("status", status, flush=True)
"""


def environment() -> dict[str, str]:
    """That of this process, with the modules that it imports."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def outcomes(paths: list[Path]) -> dict[str, str]:
    """What reading each file ends with, within 1 GiB above its size and 10 s of the processor."""
    call = [sys.executable, "-c", CHILD, *map(str, paths)]
    done = subprocess.run(
        call, capture_output=True, text=True, check=True, timeout=280, env=environment()
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths), done.stdout
    return dict(line.split(": ", 1) for line in lines)


def test_what_costs_more_than_its_size_says_is_refused_in_one_line(tmp_path: Path) -> None:
    files = costly(tmp_path)
    found = outcomes(list(files.values()))
    assert set(found) == set(files)
    for name, outcome in found.items():
        print(f"{name:36} {outcome.replace(str(tmp_path), '…')[:150]}")
        assert outcome.startswith("CheckpointError"), (name, outcome)
        assert len(outcome) < 400
    # The limits are real: the same file under stock torch goes past them
    unchecked = CHILD.replace(
        "read_checkpoint(path).student_config(n_heads=4)", "torch.load(path, weights_only=True)"
    ).replace("except LiquidError", "except MemoryError")
    stock = [sys.executable, "-c", unchecked, str(files["bytearray"]), str(files["deep key"])]
    done = subprocess.run(
        stock, capture_output=True, text=True, check=True, timeout=280, env=environment()
    )
    assert "bytearray: MemoryError" in done.stdout
    assert "deep key: status -" in done.stdout


# ── the grammar


FOUR = one(4)

REFUSED: dict[str, tuple[bytes, str]] = {
    "no protocol 2": (b"\x80\x04N", "POP|PROTO at byte"),
    "a call of code": (named("posix", "mkdir") + text("x") + b"\x85R", "refers to posix.mkdir"),
    "an old name of code": (named("__builtin__", "eval"), "refers to __builtin__.eval"),
    "a name that is none": (b"ctorch\n\x1b[31m\n", r"refers to torch.\?\[31m"),
    "an instance": (named("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
    "bytes of Python 2": (b"U\x01a", "SHORT_BINSTRING"),
    "frozenset": (b"\x91", "FROZENSET"),
    "empty set": (b"\x8f", "EMPTY_SET"),
    "POP": (b"N0N", "POP"),
    "DUP": (b"]2a", "DUP"),
    "unknown opcode": (b"\xff", "0xff"),
    "nothing": (b"", "takes more than it has put"),
    "no mark": (b"Nt", "takes more than it has put"),
    "unknown memo": (b"h\x07", "refers to what it has not put"),
    "cut text": (b"X\xff\0\0\0a", "cut short"),
    "text that is no UTF-8": (b"X\x01\0\0\0\xff", "not UTF-8"),
    "surrogate": (b"X\x03\0\0\0\xed\xa0\x80", "not UTF-8"),
    "key without value": (b"}(" + text("a") + b"u", "key without a value"),
    "list as key": (b"}]Ns", "a list as a key"),
    "tuple as key": (b"})Ns", "a tuple as a key"),
    "large number as key": (b"}" + long(1 << 61) + b"Ns", "a number as a key"),
    "text where a list is needed": (text("a") + b"Na", "has a text where a list is needed"),
    "list where a dict is needed": (b"]NNs", "has a list where a dict is needed"),
    "cycle": (b"]q\0h\0a", "a value that refers to itself"),
    "cycle of dicts": (b"}q\0" + text("a") + b"h\0s", "a value that refers to itself"),
    "a list that grows later": (b"]q\0]h\0ah\0Na", "refers to itself|where a list"),
    "state of a dict": (b"}}" + text("items") + b"Nsb", "sets the state"),
    "two states": (
        named("collections", "OrderedDict")
        + b")R}("
        + text("a")
        + b"N"
        + text("_metadata")
        + b"Nub",
        "sets the state",
    ),
    "state of a tensor": (tensor(storage(), FOUR, one(1)) + b"}b", "has a tensor where a dict"),
    "function with other values": (
        named("torch", "Size") + text("a") + b"\x85R",
        "calls Size with other values",
    ),
    "a called dtype": (named("torch", "float32") + b")R", "a dtype where a function"),
    "outside value": (text("x") + b"Q", "a text where a tuple"),
    "outside value of other parts": (b")Q", "no storage"),
    "absent record": (model(tensor(storage("7"), FOUR, one(1))), "has a record of 0 bytes"),
    "short record": (model(tensor(storage(count=5), one(5), one(1))), "a storage of 20 bytes has"),
    "wider type": (model(tensor(storage(kind="DoubleStorage"), FOUR, one(1))), "of 32 bytes has"),
    "negative count": (storage(count=-1), "a storage of -4 bytes"),
    "two types": (b"(" + storage() + storage(kind="HalfStorage") + b"t", "is of two types"),
    "offset": (model(tensor(storage(), FOUR, one(1), offset=1)), "claims more elements than"),
    "negative offset": (model(tensor(storage(), FOUR, one(1), offset=-1)), "claims more"),
    "stride": (model(tensor(storage(), FOUR, one(2))), "claims more elements than it holds"),
    "stride of 0": (model(tensor(storage(), one(5), one(0))), "claims more elements than"),
    "negative size": (model(tensor(storage(), one(-1), one(1))), "whose shape is none"),
    "size as text": (model(tensor(storage(), text("a") + b"\x85", one(1))), "shape is none"),
    "sizes without strides": (model(tensor(storage(), FOUR, b")")), "whose shape is none"),
    "hooks": (
        model(tensor(storage(), FOUR, one(1), hooks=b"}" + text("a") + b"Ns")),
        "tensor with hooks",
    ),
    "a tensor of a text": (model(tensor(text("x"), FOUR, one(1))), "of other parts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_does_not_write_is_refused(tmp_path: Path, name: str) -> None:
    program, message = REFUSED[name]
    path = archive(tmp_path / "x.pt", program)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_shape_beyond_64_bits_is_refused(tmp_path: Path) -> None:
    size, stride = long(1 << 80) + b"\x85", number(0) + b"\x85"
    path = archive(tmp_path / "x.pt", model(tensor(storage(), size, stride)))
    with pytest.raises(CheckpointError, match="claims more elements than it holds"):
        read_checkpoint(path)


def test_the_walk_reads_what_torch_reads(tmp_path: Path) -> None:
    """Another format before the archive, two records of one name, another directory."""
    torch.save({"model": {}, "step": 1}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    legacy = tmp_path / "legacy.pt"
    torch.save([1], legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "appended.pt", "w") as file:
        file.writestr("archive/data.pkl", START + b"}" + STOP)
    appended = bytearray((tmp_path / "appended.pt").read_bytes())
    start = len(legacy.read_bytes())
    for at in (appended.rfind(b"PK\x01\x02") + 42, appended.rfind(b"PK\x05\x06") + 16):
        moved = int.from_bytes(appended[at : at + 4], "little") + start
        appended[at : at + 4] = moved.to_bytes(4, "little")
    cases: dict[str, bytes] = {"legacy": legacy.read_bytes() + appended, "junk": b"\0" + whole}
    for name, second in (("case", "archive/DATA.PKL"), ("twice", "archive/data.pkl")):
        with zipfile.ZipFile(tmp_path / f"{name}.pt", "w") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, of the second name
            file.writestr("archive/data.pkl", START + b"}" + STOP)
            file.writestr(second, START + named("posix", "mkdir") + STOP)
        cases[name] = (tmp_path / f"{name}.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("archive/data.pkl", START + b"}" + STOP)
        file.writestr("other/data.pkl", START + named("posix", "mkdir") + STOP)
    cases["other"] = (tmp_path / "other.pt").read_bytes()
    for name, content in cases.items():
        path = tmp_path / "case.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a checkpoint|is refused") as caught:
            read_checkpoint(path)
        print(name, str(caught.value).replace(str(tmp_path), "…"))


def test_tensors_are_looked_through_once_each(tmp_path: Path) -> None:
    """References to one tensor, as weights and as moments, cost nothing; looking through would."""
    shared: Any = torch.zeros(1 << 20)
    weights = {f"w{i}": shared for i in range(40_000)}
    torch.save(weights, tmp_path / "weights.pt")
    payload = base_package_payload(trained=24, rows=100)
    many = payload["optimizer"]["state"][0]
    many |= {f"k{i}": shared for i in range(40_000)}
    torch.save(payload, tmp_path / "moments.pt")
    with pytest.raises(CheckpointError, match="its weights are 167772160000 bytes"):
        read_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="has 40003 entries"):
        read_checkpoint(tmp_path / "moments.pt").optimizer_by_name()
    for key in [key for key in many if key.startswith("k")]:
        del many[key]
    many["exp_avg"] = shared
    torch.save(payload, tmp_path / "moments.pt")
    with pytest.raises(CheckpointError, match="has 1048576 elements for a parameter of 1024"):
        read_checkpoint(tmp_path / "moments.pt").optimizer_by_name()


def test_a_student_of_too_many_blocks_is_not_built(tmp_path: Path) -> None:
    weights = {"embed.weight": torch.zeros(4, 2)}
    weights |= {f"blocks.{i}.x": torch.zeros(0) for i in range(600)}
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="has 600 blocks; a student has 512 at most"):
        read_checkpoint(tmp_path / "x.pt").student_config(1)
    wide = {"embed.weight": torch.zeros(1, (1 << 20) + 1), "blocks.0.x": torch.zeros(0)}
    torch.save(wide, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is 1048577 wide; a student is"):
        read_checkpoint(tmp_path / "x.pt").student_config(1)
    torch.save({"embed.weight": torch.zeros(0, 1 << 40)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"no embed.weight \[V, D\]"):
        read_checkpoint(tmp_path / "x.pt").student_config(1)
