"""Compiled code kept by runs that start in processes, and with compilers' caches, of their own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.samples import save_student
from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.metadata import compiled_of
from trainer.checkpoints.names import COMPILE_CACHE
from trainer.checkpoints.reading import read_checkpoint
from trainer.checkpoints.sidecar import read_sidecars
from trainer.checkpoints.snapshots import Snapshots
from trainer.settings.config import TrainConfig
from trainer.storage.places import open_location
from trainer.training.compile_cache import CompileCache
from trainer.training.precision import Precision

Settings = dict[str, Any]

_START = """
import json, sys
from torch._dynamo.utils import counters
from trainer import entrypoint
from trainer.runtime.log import set_up_logging
set_up_logging()
entrypoint.run(json.loads(sys.argv[1]))
print(json.dumps(counters["inductor"]))
"""


class Start:
    """A start on a machine of its own: nothing that was compiled before is there."""

    def __init__(self, settings: Settings, machine: Path) -> None:
        environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(machine)}
        done = subprocess.run(
            [sys.executable, "-c", _START, json.dumps(settings)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        counted = json.loads(done.stdout.splitlines()[-1])
        self.compiled = counted.get("fxgraph_cache_miss", 0)
        self.found = counted.get("fxgraph_cache_hit", 0)
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        self.messages = [line["message"] for line in lines if "compiled code" in line["message"]]


@pytest.fixture(scope="module")
def first(
    corpus: Path, teacher_dir: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    """The settings of a run that was killed after its first snapshot, which has compiled all."""
    place = tmp_path_factory.mktemp("first")
    settings = {
        "teacher_name": str(teacher_dir),
        "dataset_name": str(corpus),
        "cache_dir": str(root / "cache"),
        "local_workdir": str(place / "output"),
        "block_size": 16,
        "d_model": 16,
        "n_layers": 1,
        "n_heads": 2,
        "alpha": 0.0,
        "micro_batch": 2,
        "global_batch": 2,
        "train_steps": 4,
        "eval_every": 2,
        "eval_max_tokens": 200,
        "compile": "on",
    }
    run = Start(settings | {"save_every": 2}, place / "machine")
    assert (run.compiled > 0, run.found) == (True, 0)
    assert not run.messages, "none was looked for"
    output = place / "output"
    digest = hashlib.sha256((output / COMPILE_CACHE).read_bytes()).hexdigest()
    sidecars = read_sidecars(open_location(str(output)))
    assert {sidecar.step for sidecar in sidecars} == {2, 4}
    assert {compiled_of(sidecar.meta) for sidecar in sidecars} == {digest}
    for sidecar in sidecars:
        if sidecar.step == 4:
            for path in output.glob(f"{sidecar.name}*"):
                path.unlink()
    return settings


def test_a_restart_finds_all_that_was_compiled(first: Settings, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(first["local_workdir"], output)
    before = (output / COMPILE_CACHE).stat()
    again = Start(first | {"local_workdir": str(output)}, tmp_path / "machine")
    assert (again.compiled, again.found > 0) == (0, True)
    assert len(again.messages) == 1
    assert "using the compiled code" in again.messages[0]
    after = (output / COMPILE_CACHE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (final,) = [s for s in read_sidecars(open_location(str(output))) if s.name == "final.pt"]
    assert compiled_of(final.meta) is not None, "later starts may use it too"


@pytest.mark.soak
def test_another_run_uses_what_it_is_told_to(first: Settings, tmp_path: Path) -> None:
    output = Path(first["local_workdir"])
    other = first | {
        "local_workdir": str(tmp_path / "output"),
        "resume_gcs_uri": str(output / "ckpt_step_2.pt"),
        "compile_cache": str(output / COMPILE_CACHE),
        "train_steps": 6,
    }
    run = Start(other, tmp_path / "machine")
    assert (run.compiled, run.found > 0) == (0, True)
    (said,) = run.messages
    assert f"using the compiled code of {output / COMPILE_CACHE}" in said
    digest = hashlib.sha256((tmp_path / "output" / COMPILE_CACHE).read_bytes()).hexdigest()
    sidecars = read_sidecars(open_location(str(tmp_path / "output")))
    assert {compiled_of(sidecar.meta) for sidecar in sidecars} == {digest}, "its own, for restarts"


# ── what is not used ──────────────────────────────────────────────────────────────────────────

CPU = Precision(torch.device("cpu"), torch.float32, torch.float32)


def begin(
    place: Path, digest: str | None = None, **settings: Any
) -> tuple[CompileCache, Snapshots]:
    snapshots = Snapshots(str(place), str(place))
    config = TrainConfig(**{"compile": "on", "local_workdir": str(place)} | settings)
    return CompileCache(config, CPU, snapshots, digest), snapshots


def with_header(data: bytes, **fields: Any) -> bytes:
    line, _, payload = data.partition(b"\n")
    return json.dumps(json.loads(line) | fields).encode() + b"\n" + payload


def with_payload(data: bytes, payload: bytes) -> bytes:
    digest = hashlib.sha256(payload).hexdigest()
    return with_header(data.partition(b"\n")[0] + b"\n" + payload, sha256=digest)


def archive_of(**members: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target.getvalue()


UNUSABLE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "no file of compiled code"),
    "not ours": (lambda data: os.urandom(5000), "no file of compiled code"),
    "another value": (lambda data: b"[1]\n" + data, "no file of compiled code"),
    "deep": (lambda data: b"[" * 4000, "no file of compiled code"),
    "cut short": (lambda data: data[:-100], "damaged or cut short"),
    "cut in the header": (lambda data: data[:50], "no file of compiled code"),
    "a flipped bit": (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "damaged"),
    "another torch": (lambda data: with_header(data, torch="2.0.0"), "made with torch '2.0.0'"),
    "another GPU": (lambda data: with_header(data, device="T4"), "made with device 'T4'"),
    "another format": (lambda data: with_header(data, compile_cache=9), "compile_cache '9'"),
    "no archive": (lambda data: with_payload(data, b"what"), "archive is damaged"),
    "an empty archive": (lambda data: with_payload(data, archive_of()), "torch cannot read"),
    "no block of torch's": (
        lambda data: with_payload(data, archive_of(torch=b"\x80\x04N.")),
        "torch cannot read",
    ),
    "a way out": (
        lambda data: with_payload(data, archive_of(**{"triton/../../x": b"x"})),
        "it holds 'triton/../../x'",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_files_are_named_in_one_line(
    first: Settings, case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = UNUSABLE[case]
    whole = Path(first["local_workdir"], COMPILE_CACHE).read_bytes()
    given = tmp_path / "given"
    given.write_bytes(change(whole))
    cache, snapshots = begin(tmp_path, compile_cache=str(given))
    cache.use()
    (line,) = caplog.messages
    assert line.startswith(f"the compiled code of {given} is not used: ")
    assert reason in line
    assert "\n" not in line
    assert snapshots.compiled is None


def test_a_place_with_nothing_is_no_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "trainer")
    begin(tmp_path, compile_cache=str(tmp_path / "absent"))[0].use()
    begin(tmp_path, compile_cache=str(tmp_path))[0].use()
    begin(tmp_path, "ab" * 32)[0].use()
    assert len(caplog.messages) == 3


def test_what_lies_at_the_output_counts_only_by_its_digest_and_owner(
    first: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(first["local_workdir"], COMPILE_CACHE).read_bytes()
    place = tmp_path / "output"
    place.mkdir()
    planted = place / COMPILE_CACHE
    planted.write_bytes(data)
    cache, _ = begin(place)
    cache.use()
    assert not caplog.messages, "no snapshot names it, so nothing is read"
    begin(place, "ab" * 32)[0].use()
    assert "not the one that the run's snapshot names" in caplog.messages[-1]
    digest = hashlib.sha256(data).hexdigest()
    for path, mode in ((planted, 0o666), (place, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        begin(place, digest)[0].use()
        assert f"another user may have written {path}" in caplog.messages[-1]
        path.chmod(before)
    begin(place, digest, compile_cache="off")[0].use()
    begin(place, digest, compile="off")[0].use()
    assert len(caplog.messages) == 3


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), MemoryError()])
def test_a_failure_to_keep_it_is_told_and_ends_nothing(
    failure: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> bytes:
        raise failure

    snapshots = Snapshots(str(tmp_path), str(tmp_path))
    snapshots.keep_compiled(make)
    save_student(tmp_path / "made.pt")
    made = read_checkpoint(tmp_path / "made.pt")
    snapshots.save(Snapshot(made.weights, None, {}, 7, {}, made.meta), ["ckpt_step_7.pt"])
    snapshots.finish()
    assert [message for message in caplog.messages if f"{COMPILE_CACHE} is not kept" in message]
    (sidecar,) = [s for s in read_sidecars(open_location(str(tmp_path))) if s.step == 7]
    assert compiled_of(sidecar.meta) is None
