"""What a start finds at its output location, and what a run leaves there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.names import BEST, FINAL, best_name, sidecar_name, step_name
from trainer.checkpoints.snapshots import Snapshots, read_from
from trainer.runtime.errors import CheckpointError, StorageError
from trainer.storage.places import open_location
from trainer.storage.scratch import scratch_directory


def snapshot(step: int) -> Snapshot:
    meta = {"step": step, "metrics": {}}
    return Snapshot({"weight": torch.full((4,), float(step))}, None, {}, step, {}, meta)


def test_what_killed_processes_left_is_removed_and_what_running_ones_have_is_not(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    for name in (
        f".staging-{host}-{ended.pid}-a",
        f".staging-{host}-{os.getpid()}-b",  # of an earlier container, whose numbers come again
        f".staging-{host}-{os.getppid()}-c",
        f".staging-elsewhere-{ended.pid}-d",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "snapshot.pt").write_bytes(b"x")
    Snapshots(str(tmp_path), str(tmp_path)).check_writable()
    kept = sorted(path.name.rpartition("-")[2] for path in tmp_path.glob(".staging-*"))
    assert kept == ["c", "d"]


def test_what_a_killed_process_fetched_is_removed_before_the_next_fetch(
    tmp_path: Path, gcs_bucket: str
) -> None:
    uri = f"{gcs_bucket}/run"
    snapshots = Snapshots(uri, str(tmp_path))
    snapshots.save(snapshot(1), [FINAL])
    snapshots.finish()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    prefix = f".fetch-{socket.gethostname()}"

    def leave() -> None:
        for name in (f"{ended.pid}-a", f"{os.getpid()}-b", f"{os.getppid()}-c"):
            (tmp_path / f"{prefix}-{name}").mkdir(exist_ok=True)
            (tmp_path / f"{prefix}-{name}" / "best.pt").write_bytes(b"x")

    for read in (
        lambda: Snapshots(uri, str(tmp_path)).newest(),
        lambda: read_from(f"{uri}/final.pt", tmp_path),
    ):
        leave()
        with scratch_directory("fetch", tmp_path) as ours:
            assert read() is not None
            assert {path.name for path in tmp_path.iterdir()} == {
                f"{prefix}-{os.getppid()}-c",
                Path(ours).name,
            }


def test_no_room_to_write_a_snapshot_is_one_line(tmp_path: Path, gcs_bucket: str) -> None:
    work = tmp_path / "work"
    work.write_bytes(b"a file in the way")
    snapshots = Snapshots(f"{gcs_bucket}/run", str(work))
    snapshots.save(snapshot(1), [BEST])
    with pytest.raises(StorageError, match="work' failed: a file is in the way") as caught:
        snapshots.finish()
    assert "\n" not in str(caught.value)


LITTLE_MEMORY = """
    import re, resource, sys
    from pathlib import Path
    from trainer.runtime.errors import LiquidError
    from trainer.checkpoints.snapshots import Snapshots
    taken = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]),) * 2)
    try:
        print("step", Snapshots(sys.argv[1], sys.argv[1]).newest().step)
    except LiquidError as error:
        print(f"{type(error).__name__} {error.exit_status}: {error}")
    """


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
@pytest.mark.parametrize("spare", [24 << 20, 72 << 20])
def test_too_little_memory_is_no_damage(tmp_path: Path, spare: int) -> None:
    """Taken for damage, it would send the run back to an older snapshot, or to its start."""
    snapshot(1).write(tmp_path / "ckpt_step_1.pt")
    large = snapshot(2)
    large.model["weight"] = torch.zeros(16 << 20)  # 64 MiB, and as much again to check it
    large.write(tmp_path / "ckpt_step_2.pt")
    command = [sys.executable, "-c", textwrap.dedent(LITTLE_MEMORY), str(tmp_path), str(spare)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"StorageError 1: reading '{tmp_path}/ckpt_step_2.pt' failed: out of")
    assert said.count("\n") == 1


def test_a_location_whose_snapshots_are_all_damaged_is_not_started_over(tmp_path: Path) -> None:
    def damaged(step: int) -> Path:
        path = tmp_path / step_name(step)
        snapshot(step).write(path)
        path.write_bytes(path.read_bytes()[:-1])
        return path

    damaged(1), damaged(2)
    Path(tmp_path, "best.pt").write_bytes(b"x")
    Path(tmp_path, "best.pt.meta.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="but none can be used") as caught:
        Snapshots(str(tmp_path), str(tmp_path)).newest()
    for part in (
        str(tmp_path),
        "(ckpt_step_2.pt, ckpt_step_1.pt, best.pt): ckpt_step_2.pt has ",
        "--output_gcs_uri",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    snapshot(0).write(tmp_path / step_name(0))
    newest = Snapshots(str(tmp_path), str(tmp_path)).newest()
    assert newest is not None
    assert newest.step == 0


def test_a_kill_before_the_first_sidecar_leaves_no_snapshot(
    tmp_path: Path, gcs_bucket: str
) -> None:
    of_a_run = snapshot(3)
    of_a_run.meta["settings"] = {"seed": 1}
    of_a_run.write(tmp_path / step_name(3))
    (tmp_path / sidecar_name(step_name(3))).unlink()
    open_location(gcs_bucket).put(tmp_path / step_name(3), step_name(3))
    for uri in (str(tmp_path), gcs_bucket):
        assert Snapshots(uri, str(tmp_path / "work")).newest() is None


@pytest.mark.parametrize("content", ["of the base package", "damaged"])
def test_a_checkpoint_of_no_run_is_not_written_over(
    tmp_path: Path, gcs_bucket: str, content: str
) -> None:
    """The base package's have the same names and no sidecars."""
    for name in (step_name(62_000), BEST):
        if content == "damaged":
            (tmp_path / name).write_bytes(b"x")
        else:
            torch.save({"model": {"weight": torch.zeros(4)}, "step": 62_000}, tmp_path / name)
        open_location(gcs_bucket).put(tmp_path / name, name)
    for uri in (str(tmp_path), gcs_bucket):
        with pytest.raises(CheckpointError, match="has no sidecar and is no snapshot of this run"):
            Snapshots(uri, str(tmp_path / "work")).newest()


@pytest.mark.parametrize("goes_on", [False, True])
def test_retention_leaves_alone_what_the_run_did_not_write(tmp_path: Path, goes_on: bool) -> None:
    others = [0, *range(60_000, 60_006)]
    if goes_on:
        snapshot(1).write(tmp_path / step_name(1))
    snapshots = Snapshots(str(tmp_path), str(tmp_path))
    assert (snapshots.newest() is not None) == goes_on
    for step in others:
        (tmp_path / step_name(step)).write_bytes(b"x")
    for step in range(2, 9):
        snapshots.save(snapshot(step), [step_name(step)])
    snapshots.finish()
    steps = {path.name for path in tmp_path.glob("ckpt_step_*.pt")}
    assert steps == {step_name(step) for step in [*range(4, 9), *others]}


def test_damaged_snapshots_take_no_room_from_new_ones(tmp_path: Path) -> None:
    snapshot(150).write(tmp_path / best_name(150, 4.0))
    for step in range(180, 280, 20):
        snapshot(step).write(tmp_path / step_name(step))
        damaged = (tmp_path / step_name(step)).read_bytes()
        (tmp_path / step_name(step)).write_bytes(damaged[:-1] + b"x")
    snapshots = Snapshots(str(tmp_path), str(tmp_path))
    found = snapshots.newest()
    assert found is not None
    assert found.step == 150
    snapshots.save(snapshot(162), [step_name(162)])
    snapshots.finish()
    again = Snapshots(str(tmp_path), str(tmp_path)).newest()
    assert again is not None
    assert again.step == 162


@pytest.mark.parametrize("remote", [False, True])
def test_the_rolling_best_is_the_best_again_after_a_kill(
    tmp_path: Path, gcs_bucket: str, remote: bool
) -> None:
    uri = gcs_bucket if remote else str(tmp_path / "run")
    first = Snapshots(uri, str(tmp_path / "first"))
    first.save(snapshot(2), [best_name(2, 4.2), BEST])
    first.save(snapshot(4), [best_name(4, 4.1)])  # and then a kill
    first.finish()
    second = Snapshots(uri, str(tmp_path / "second"))
    second.restore_best(4)
    best = read_from(f"{uri}/{BEST}", tmp_path / "second")
    assert best.step == 4
    second.restore_best(6)  # of which there is none
    assert read_from(f"{uri}/{BEST}", tmp_path / "second").step == 4
