"""The checkpoint format: names, retention, sidecars, the base package's layout, hostile files."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.samples import base_package_payload
from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.metadata import metric_of
from trainer.checkpoints.names import (
    best_name,
    is_checkpoint_name,
    outdated,
    sidecar_name,
    step_name,
    time_name,
)
from trainer.checkpoints.reading import read_checkpoint
from trainer.checkpoints.sidecar import Sidecar, verify_file
from trainer.checkpoints.snapshots import read_from
from trainer.models.student import Student, StudentConfig
from trainer.runtime.errors import CheckpointError, StorageError

SMALL = StudentConfig(vocab_size=64, d_model=16, n_layers=2, n_heads=4, positions=32)


def small_weights() -> dict[str, torch.Tensor]:
    return Student(SMALL).initialize(0).state_dict()


def snapshot(step: int = 7, **meta: Any) -> Snapshot:
    described = {"format_version": 1, "step": step, "metrics": {"val_loss_student": 3.5}} | meta
    return Snapshot(small_weights(), None, {"step": step}, step, {"best_step": 1}, described)


# ── names and retention


def test_names() -> None:
    assert step_name(1000) == "ckpt_step_1000.pt"
    assert best_name(400, 3.14159) == "ckpt_best_step400_vl3.1416.pt"
    assert time_name(1700000000.9) == "ckpt_time_1700000000.pt"
    assert sidecar_name("best.pt") == "best.pt.meta.json"
    for name in (
        "best.pt",
        "final.pt",
        step_name(1),
        best_name(1, 2.0),
        time_name(1),
    ):
        assert is_checkpoint_name(name)
    for name in ("other.pt", "best.pt.meta.json", "ckpt_step_x.pt", "../best.pt", ".best.pt"):
        assert not is_checkpoint_name(name)


def test_retention_keeps_the_last_of_each_kind() -> None:
    steps = [step_name(step) for step in (9, 10, 100, 200, 300, 1000, 1100)]
    bests = [best_name(step, 4.0 - step / 1e4) for step in (5, 50, 500, 5000)]
    hour = 3600
    times = [time_name(1_700_000_000 + at) for at in (0, 30 * 60, 4 * hour, 5 * hour)]
    names = [*steps, *bests, *times, "best.pt", "final.pt", "notes.txt"]
    drop = outdated(names, [steps[-1], bests[-1], times[-1], "best.pt"])
    assert sorted(drop) == sorted([*steps[:2], bests[0], *times[:2]])
    assert outdated(names, [steps[-1]]) == steps[:2]
    kept = [*steps[2:], *bests[1:], *times[2:]]
    assert outdated(kept, [steps[-1], bests[-1], times[-1]]) == []


def test_a_new_checkpoint_makes_no_room_for_one_that_only_seems_newer() -> None:
    """Damaged ones of higher steps that a start went back behind, and clocks that ran ahead."""
    steps = [step_name(step) for step in range(100, 200, 10)]
    assert outdated(steps, [step_name(120)]) == []
    assert outdated(steps, [step_name(150)]) == [step_name(100)]
    times = [time_name(1_700_000_000 + day * 86_400) for day in (0, 1, 2)]
    assert outdated(times, [times[0]]) == []
    assert outdated(times, [times[1]]) == [times[0]]


# ── round trip


def test_a_written_checkpoint_loads_with_stock_torch_and_its_sidecar_describes_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "best.pt"
    sidecar = snapshot().write(path)
    payload = torch.load(path, weights_only=True)
    assert {"model", "optimizer", "scheduler", "step", "trainer_state", "meta"} <= set(payload)
    Student(SMALL).load_state_dict(payload["model"], strict=True)
    parsed = Sidecar.parse((tmp_path / "best.pt.meta.json").read_bytes(), "best.pt")
    assert parsed == sidecar
    assert parsed.size == path.stat().st_size
    with path.open("rb") as file:
        verify_file(file, parsed)
    read = read_checkpoint(path)
    assert (read.step, read.meta["metrics"]) == (7, {"val_loss_student": 3.5})
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "best.pt.meta.json"]


def test_a_file_that_its_sidecar_does_not_describe_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    sidecar = snapshot().write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with path.open("rb") as file, pytest.raises(CheckpointError, match="but its sidecar says"):
        verify_file(file, sidecar)
    path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with path.open("rb") as file, pytest.raises(CheckpointError, match="has checksum"):
        verify_file(file, sidecar)


# ── the base package's layout


def test_base_package_checkpoints_are_understood(tmp_path: Path) -> None:
    payload = base_package_payload(trained=24, rows=100)
    torch.save(payload, tmp_path / "base.pt")
    read = read_checkpoint(tmp_path / "base.pt")
    assert read.step == 68150
    assert read.student_config(n_heads=4).positions == 100
    assert read.trained_positions() == 24, "read off AdamW's second moments"
    moments = read.optimizer_by_name()
    names = list(payload["model"])
    assert list(moments) == names
    for index, name in enumerate(names):
        expected = payload["optimizer"]["state"][index]["exp_avg"]
        assert torch.equal(moments[name]["exp_avg"], expected)


def test_a_bare_state_dict_is_a_checkpoint_at_step_zero(tmp_path: Path) -> None:
    torch.save(small_weights(), tmp_path / "bare.pt")
    read = read_checkpoint(tmp_path / "bare.pt")
    assert (read.step, read.optimizer_by_name(), read.trained_positions()) == (0, {}, None)
    assert read.student_config(n_heads=4) == SMALL


# ── hostile and broken input


class Bomb:
    """Pickles to a call that would leave a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


def with_weights(change: dict[str, Any]) -> dict[str, Any]:
    return {"model": small_weights() | change, "step": 1}


def zip_with(path: Path, *, compressed: bool) -> None:
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": {}}))
        archive.writestr("archive/data/0", bytes(2_000_000))


def lie_about_size(path: Path) -> None:
    """A stored entry whose directory record claims a terabyte."""
    zip_with(path, compressed=False)
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = (0xF0000000).to_bytes(4, "little")
    path.write_bytes(bytes(data))


def two_directories(path: Path) -> None:
    """Python finds a directory of small stored entries; torch, by its offset, of a bomb."""
    zip_with(path, compressed=True)
    data = path.read_bytes()
    end = data.rfind(b"PK\x05\x06")
    start = int.from_bytes(data[end + 16 : end + 20], "little")
    harmless = bytearray(data[start:end])
    at = 0
    while at < len(harmless):
        harmless[at + 10 : at + 12] = bytes(2)
        harmless[at + 20 : at + 28] = (1).to_bytes(4, "little") * 2
        at += 46 + sum(harmless[at + 28 : at + 33 : 2])
    path.write_bytes(data[:end] + bytes(harmless) + data[end:])


def hostile_files(directory: Path) -> dict[str, tuple[Path, str]]:
    """Name → file and a part of the one line it gets."""
    made: dict[str, tuple[Path, str]] = {}

    def saved(name: str, content: Any, message: str) -> None:
        torch.save(content, directory / f"{name}.pt")
        made[name] = (directory / f"{name}.pt", message)

    def raw(name: str, content: bytes, message: str) -> None:
        (directory / f"{name}.pt").write_bytes(content)
        made[name] = (directory / f"{name}.pt", message)

    buffer = io.BytesIO()
    torch.save({"model": small_weights(), "step": 1}, buffer)
    whole = buffer.getvalue()
    raw(
        "truncated", whole[: len(whole) // 2], "not a checkpoint of torch.save, or it was cut short"
    )
    raw("empty", b"", "not a checkpoint of torch.save")
    raw("text", b"hello", "not a checkpoint of torch.save")
    bomb = Bomb(directory / "canary")
    raw("plain pickle", pickle.dumps(bomb), "not a checkpoint of torch.save")
    saved("pickle bomb", {"model": small_weights(), "meta": bomb}, "which could run code")
    saved("bomb in bare dict", bomb, "which could run code")
    zip_with(directory / "compressed.pt", compressed=True)
    made["zip bomb"] = (directory / "compressed.pt", "it is a compressed archive")
    lie_about_size(directory / "lying.pt")
    made["lying size"] = (directory / "lying.pt", "it claims 4026")
    two_directories(directory / "two directories.pt")
    made["two directories"] = (directory / "two directories.pt", "its directory is not where")
    newer = bytearray(whole)
    newer[whole.rfind(b"PK\x01\x02") + 6] = 99
    raw("of a newer zip", bytes(newer), "not a checkpoint of torch.save")
    codec = pickle.dumps({}, 2)[:2] + b"c_codecs\nencode\n(X\x01\0\0\0aX\x03\0\0\0zzztR."
    for name, program in (("cut pickle", b"\x80\x02J\x01"), ("codec", codec)):
        with zipfile.ZipFile(directory / f"{name}.pt", "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", "3\n")
        made[name] = (directory / f"{name}.pt", "cannot be read as a checkpoint")
    shared = torch.zeros(64, 16)
    saved("shared", with_weights({f"w{i}": shared for i in range(99)}), "its weights are")
    wide = torch.full((16,), 1e300, dtype=torch.float64)
    saved("too wide", with_weights({"ln_f.bias": wide}), "ln_f.bias has values that are not finite")
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    saved("nested", with_weights({"ln_f.bias": nested}), "not a dense float one")
    layers: Any = []
    for _ in range(64):
        layers = [layers, layers]
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    many = {"model": small_weights(), "step": 1}
    for name, value in (("deep", layers), ("cyclic", cyclic), ("long", "x" * (1 << 21))):
        saved(f"{name} metadata", many | {"meta": {"alpha": value}}, "larger than any run's")
    saved("metrics", many | {"meta": {"metrics": {"a": "x" * 99}}}, "metrics that are not numbers")
    saved("meta step", many | {"meta": {"step": torch.zeros(2)}}, "has a Tensor in it")
    meta_device = torch.zeros(64, 16, device="meta")
    saved("no values", with_weights({"embed.weight": meta_device}), "a shape but no values")
    float8 = torch.zeros(64, 16).to(torch.float8_e4m3fn)
    saved("float8", with_weights({"embed.weight": float8}), "float8_e4m3fn tensor, not a dense")
    rows = torch.zeros(64, 16).to_sparse_csr()
    saved("sparse rows", with_weights({"embed.weight": rows}), "not a dense float one")
    saved("a list", [1, 2], "holds a list, not a checkpoint's dict")
    saved("no model", {"step": 3, "other": 1}, "has no 'model' with named tensors")
    saved("model of strings", {"model": {"embed.weight": "x"}, "step": 3}, "has no 'model'")
    nan = torch.full((64, 16), float("nan"))
    saved("NaN", with_weights({"embed.weight": nan}), "embed.weight has values that are not finite")
    huge = torch.zeros(1).as_strided((1 << 40, 16), (0, 0))
    saved("claims terabytes", with_weights({"embed.weight": huge}), "claims more elements than it")
    saved("integers", with_weights({"ln_f.bias": torch.zeros(16, dtype=torch.int64)}), "int64")
    saved(
        "wrong vocabulary", with_weights({"lm_head.weight": torch.zeros(63, 16)}), "lm_head.weight"
    )
    saved("wrong width", with_weights({"ln_f.bias": torch.zeros(17)}), "ln_f.bias has shape [17]")
    saved("extra weight", with_weights({"evil": torch.zeros(2)}), "evil has shape [2]")
    missing = small_weights()
    del missing["blocks.1.ln2.bias"]
    saved("missing weight", {"model": missing, "step": 1}, "blocks.1.ln2.bias has shape none")
    saved("negative step", {"model": small_weights(), "step": -4}, "has step -4")
    saved("step as text", {"model": small_weights(), "step": "9"}, "has step '9'")
    saved(
        "contradiction", {"model": small_weights(), "step": 9, "meta": {"step": 8}}, "contradicts"
    )
    saved("meta as list", {"model": small_weights(), "step": 9, "meta": [1]}, "meta that is a list")
    return made


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
def test_hostile_files_get_one_line_each_and_run_nothing(tmp_path: Path) -> None:
    table = hostile_files(tmp_path)
    assert len(table) >= 20
    for name, (path, message) in table.items():
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path).student_config(n_heads=4)
        text = str(caught.value)
        assert "\n" not in text, name
        assert message in text, (name, text)
        assert str(path) in text, name
        print(f"{name:18} {text.replace(str(tmp_path), '…')}")
    assert not (tmp_path / "canary").exists()
    # The canary is real: plain pickle would have run it
    pickle.loads((tmp_path / "plain pickle.pt").read_bytes())
    assert (tmp_path / "canary").exists()


def test_a_fault_of_the_machine_is_no_damage(tmp_path: Path) -> None:
    loop = tmp_path / "best.pt"
    loop.symlink_to(loop)
    with pytest.raises(StorageError, match=f"best.pt' failed: {os.strerror(errno.ELOOP)}"):
        read_checkpoint(loop)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "absent.pt")
    # In a process of its own: this one would wait for a writer
    os.mkfifo(tmp_path / "pipe.pt")
    code = "import pathlib, sys; from trainer.checkpoints.reading import read_checkpoint as read"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; read(pathlib.Path(sys.argv[1]))", tmp_path / "pipe.pt"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "StorageError: reading" in done.stderr
    assert "it is a pipe, not a file" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "has no valid 'size'"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"size": "1", "crc32c": "x", "step": 1, "metrics": {}}', "no valid 'size': '1'"),
        (b'{"size": 1, "crc32c": "x", "step": true, "metrics": {}}', "no valid 'step'"),
        (b'{"size": 1, "crc32c": "x", "step": -1, "metrics": {}}', "negative"),
        (b'{"size": 1, "crc32c": "x", "step": 1, "metrics": {"a": "b"}}', "not numbers"),
        (
            b'{"size": 1, "crc32c": "x", "step": 1, "metrics": {"a": 1%s}}' % (b"0" * 400),
            "not numbers",
        ),
    ],
)
def test_sidecars_that_are_not_one(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Sidecar.parse(content, "best.pt")


def test_a_sidecar_that_lies_about_the_step_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    snapshot(step=7).write(path)
    described = tmp_path / "best.pt.meta.json"
    content = json.loads(described.read_text())
    described.write_text(json.dumps(content | {"step": 900}))
    with pytest.raises(CheckpointError, match="is at step 7, but its sidecar says 900"):
        read_from(str(path), tmp_path / "work")


def test_a_checkpoint_without_a_sidecar_is_read(tmp_path: Path) -> None:
    snapshot(step=7).write(tmp_path / "best.pt")
    (tmp_path / "best.pt.meta.json").unlink()
    assert read_from(str(tmp_path / "best.pt"), tmp_path / "work").step == 7


def test_optimizer_state_of_another_student_is_refused(tmp_path: Path) -> None:
    payload = base_package_payload(trained=24, rows=100)
    payload["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(payload, tmp_path / "base.pt")
    with pytest.raises(
        CheckpointError, match="optimizer state over 28 parameters for a student of"
    ):
        read_checkpoint(tmp_path / "base.pt").optimizer_by_name()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda o: o["param_groups"].append(3), "the optimizer's groups are damaged"),
        (lambda o: o["param_groups"][0]["params"].append("x"), "groups are damaged"),
        (lambda o: o["state"].update({99: {}}), "state is of other parameters"),
        (lambda o: o["state"].update({0: 1.0}), "state is of other parameters"),
        (
            lambda o: o["state"][0].update(exp_avg_sq=torch.zeros(4, device="meta")),
            "exp_avg_sq has a shape but no values",
        ),
        (lambda o: o["state"][0].update(step="x"), "step is a str, not a number"),
        (lambda o: o["state"][0].update(step=-1), "step is -1, which cannot be"),
        (lambda o: o["state"][0].update(step=math.nan), "step is nan, which cannot be"),
        (lambda o: o["state"][0].update(step=1e300), r"step is 1e\+300, which cannot be"),
        (lambda o: o["state"][0].update(exp_avg=math.nan), "exp_avg is nan, which cannot be"),
        (lambda o: o["state"][0]["exp_avg_sq"].neg_().sub_(1), "exp_avg_sq is -.*, which cannot"),
        (
            lambda o: o["state"][0].update(exp_avg=torch.full((2,), 1e300, dtype=torch.float64)),
            "exp_avg has values that are not finite",
        ),
        (lambda o: o["param_groups"][0].update(params=[torch.zeros(3)]), "groups are damaged"),
    ],
)
def test_damaged_optimizer_state_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    payload = base_package_payload(trained=24, rows=100)
    damage(payload["optimizer"])
    torch.save(payload, tmp_path / "base.pt")
    with pytest.raises(CheckpointError, match=f"base.pt: .*{message}"):
        read_checkpoint(tmp_path / "base.pt").optimizer_by_name()


@pytest.mark.parametrize(
    "names", [5, {"a": 1}, [1, 2], "embed.weight", torch.zeros(3)], ids=lambda v: type(v).__name__
)
def test_damaged_names_of_the_optimizer_are_refused(tmp_path: Path, names: Any) -> None:
    payload = base_package_payload(trained=24, rows=100)
    torch.save(payload | {"trainer_state": {"optimizer_names": names}}, tmp_path / "base.pt")
    with pytest.raises(CheckpointError, match=r"base.pt: its optimizer_names are not a list"):
        read_checkpoint(tmp_path / "base.pt").optimizer_by_name()


def test_metrics_that_are_not_finite_survive_standard_json() -> None:
    meta = {"step": 1, "metrics": {"a": math.nan, "b": math.inf, "c": 1.0}}
    data = Sidecar("x.pt", 1, "AAAA", meta).dump()
    assert b"NaN" not in data
    assert b"Infinity" not in data
    metrics = Sidecar.parse(data, "x.pt").metrics
    assert math.isnan(metrics["a"])
    assert metrics["c"] == 1.0
    assert metric_of({"metrics": metrics}, "b") == math.inf
    assert metric_of({"metrics": {"b": 10**400}}, "b") == math.inf
