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

from trainer import checkpoint as ckpt
from trainer.checkpoint import Snapshot
from trainer.errors import CheckpointError, StorageError
from trainer.scratch import scratch_directory
from trainer.snapshots import Snapshots, read_from


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
    snapshots.save(snapshot(1), [ckpt.FINAL])
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
    snapshots.save(snapshot(1), [ckpt.BEST])
    with pytest.raises(StorageError, match="work' failed: a file is in the way") as caught:
        snapshots.finish()
    assert "\n" not in str(caught.value)


LITTLE_MEMORY = """
    import re, resource, sys
    from pathlib import Path
    from trainer.errors import LiquidError
    from trainer.snapshots import Snapshots
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
        path = tmp_path / ckpt.step_name(step)
        snapshot(step).write(path)
        path.write_bytes(path.read_bytes()[:-1])
        return path

    (tmp_path / ckpt.step_name(9)).write_bytes(b"of an upload that was cut off by a kill")
    assert Snapshots(str(tmp_path), str(tmp_path)).newest() is None
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
    snapshot(0).write(tmp_path / ckpt.step_name(0))
    newest = Snapshots(str(tmp_path), str(tmp_path)).newest()
    assert newest is not None
    assert newest.step == 0
