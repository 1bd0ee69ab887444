"""What a start finds at its output location, and what a run leaves there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoints import snapshots
from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.names import (
    BEST,
    FINAL,
    SIDECAR_SUFFIX,
    best_name,
    outdated_at,
    sidecar_name,
    step_name,
    time_name,
)
from trainer.checkpoints.snapshots import Snapshots, read_from
from trainer.runtime.errors import CheckpointError, StorageError
from trainer.storage.base import StorageConflictError
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
    # 64 MiB, and 16 to check a piece of it in fp32
    large.model["weight"] = torch.zeros(8 << 20, dtype=torch.float64)
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


def of_a_run(step: int, seed: int = 1, train_steps: int = 40) -> Snapshot:
    made = snapshot(step)
    made.meta |= {"format_version": 1, "settings": {"seed": seed}, "train_steps": train_steps}
    return made


@pytest.fixture(params=["local", "gs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run")
    return str(request.getfixturevalue("gcs_bucket"))


class Place:
    """A run's output, to which files are given and from which they are taken by hand."""

    def __init__(self, uri: str, workdir: Path) -> None:
        self.uri, self.workdir = uri, workdir

    def put(self, made: Snapshot, name: str, *, sidecar: bool = True) -> None:
        path = self.workdir / "made" / name
        made.write(path)
        location = open_location(self.uri)
        location.list()
        location.put(path, name)
        if sidecar:
            location.put(path.with_name(sidecar_name(name)), sidecar_name(name))

    def remove(self, *names: str) -> None:
        location = open_location(self.uri)
        location.list()
        for name in names:
            location.delete(name)

    def names(self) -> set[str]:
        return {entry.name for entry in open_location(self.uri).list()}

    def sidecars(self) -> dict[str, bytes]:
        location = open_location(self.uri)
        names = {name for name in self.names() if name.endswith(SIDECAR_SUFFIX)}
        return {name: location.read_bytes(name, limit=1 << 20) for name in names}

    def open(self) -> Snapshots:
        return Snapshots(self.uri, str(self.workdir / "work"))

    def newest(self) -> int | None:
        found = self.open().newest()
        return None if found is None else found.step


@pytest.fixture
def run(uri: str, tmp_path: Path) -> Place:
    return Place(uri, tmp_path)


def test_a_kill_before_the_first_sidecar_leaves_a_snapshot_to_go_on_from(run: Place) -> None:
    run.put(of_a_run(3), step_name(3), sidecar=False)
    assert run.newest() == 3


@pytest.mark.parametrize("lost", ["all", "of the newest", "all but of the best"])
def test_a_run_whose_sidecars_are_lost_goes_on_and_has_them_again(run: Place, lost: str) -> None:
    first = run.open()
    first.check_writable()
    for step in (10, 20, 30):
        first.save(of_a_run(step), [step_name(step), best_name(step, 4.0 - step / 100), BEST])
    first.finish()
    before = run.sidecars()
    gone = {
        "all": set(before),
        "of the newest": {sidecar_name(step_name(30)), sidecar_name(best_name(30, 3.7))},
        "all but of the best": set(before) - {sidecar_name(BEST)},
    }[lost]
    run.remove(*gone)
    again = run.open()
    found = again.newest()
    assert found is not None
    assert found.step == 30
    assert torch.equal(found.weights["weight"], torch.full((4,), 30.0))
    assert run.names() == {*before, *(name.removesuffix(SIDECAR_SUFFIX) for name in before)} - gone
    again.check_writable()
    assert run.sidecars() == before
    again.save(of_a_run(40), [step_name(40), FINAL])
    again.finish()
    assert run.newest() == 40


def test_weights_without_a_sidecar_that_have_changed_are_passed_over(run: Place) -> None:
    run.put(of_a_run(10), step_name(10))
    run.put(of_a_run(20), step_name(20), sidecar=False)
    path = run.workdir / "made" / step_name(20)
    content = bytearray(path.read_bytes())
    at = content.index(torch.full((4,), 20.0).numpy().tobytes())
    content[at + 2] ^= 1
    path.write_bytes(content)
    location = open_location(run.uri)
    location.list()
    location.put(path, step_name(20))
    assert run.newest() == 10
    run.remove(sidecar_name(step_name(10)))
    assert run.newest() == 10  # whichever of the two is looked at first
    run.remove(step_name(10))
    with pytest.raises(CheckpointError, match="has no sidecar and .*data/0 in it is not what was"):
        run.newest()


def test_sidecars_whose_weights_are_all_gone_are_no_empty_place(run: Place) -> None:
    run.put(of_a_run(10), step_name(10))
    run.remove(step_name(10))
    with pytest.raises(CheckpointError, match="none can be used .*does not exist"):
        run.newest()


@pytest.mark.parametrize("described", [True, False], ids=["beside a run", "alone"])
def test_a_whole_checkpoint_of_another_run_is_not_written_over(run: Place, described: bool) -> None:
    run.put(of_a_run(10), step_name(10), sidecar=described)
    for other in (of_a_run(20, seed=2), snapshot(20)):
        run.put(other, BEST, sidecar=False)
        with pytest.raises(CheckpointError, match="has no sidecar and is no snapshot of this run"):
            run.newest()


def test_a_pair_copied_as_the_final_one_is_not_the_end(
    run: Place, caplog: pytest.LogCaptureFixture
) -> None:
    run.put(of_a_run(24), step_name(24))
    content = open_location(run.uri).read_bytes(sidecar_name(step_name(24)), limit=1 << 20)
    run.put(of_a_run(24), FINAL, sidecar=False)
    location = open_location(run.uri)
    location.put_bytes(content, sidecar_name(FINAL))
    found = run.open().newest()
    assert found is not None
    assert found.source.endswith(step_name(24))
    assert "sidecar of final.pt is of 'ckpt_step_24.pt'" in caplog.text
    run.remove(step_name(24), sidecar_name(step_name(24)))
    with pytest.raises(CheckpointError, match="none can be used .*give it its name again"):
        run.newest()


@pytest.mark.parametrize("sidecar", [True, False])
def test_a_final_checkpoint_is_at_the_end(run: Place, sidecar: bool) -> None:
    run.put(of_a_run(30), FINAL, sidecar=sidecar)
    with pytest.raises(CheckpointError, match="none can be used .*final.pt is at step 30 of 40"):
        run.newest()
    run.put(of_a_run(24), step_name(24))
    assert run.newest() == 24
    for name in (step_name(40), FINAL):
        run.put(of_a_run(40), name, sidecar=sidecar)
    found = run.open().newest()
    assert found is not None
    assert found.source == f"{run.uri}/{FINAL}"


def test_what_a_kill_leaves_of_a_removal_is_removed_at_the_next_start(run: Place) -> None:
    first = run.open()
    first.check_writable()
    for step in range(10, 60, 10):
        first.save(of_a_run(step, train_steps=90), [step_name(step)])
    first.finish()
    kept = run.names()
    run.put(of_a_run(5, train_steps=90), step_name(5), sidecar=False)
    again = run.open()
    found = again.newest()
    assert found is not None
    assert found.step == 50
    assert step_name(5) in run.names()  # another run's settings may yet be refused
    again.check_writable()
    assert run.names() == kept


def test_names_that_retention_would_have_removed() -> None:
    steps = [step_name(step) for step in (1, 2, 3, 4, 5, 6, 90)]
    bests = [best_name(step, 1.0) for step in (1, 2, 3, 4, 90)]
    times = [time_name(at) for at in (0, 20_000)]
    names = [*steps, *bests, *times, BEST, FINAL]
    assert set(outdated_at(names, 6)) == {steps[0], bests[0], times[0]}


def test_a_job_whose_output_another_one_took_over_ends_and_the_other_goes_on(
    run: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks while the first is between two snapshots, or in the middle of one."""
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "first")
    first = run.open()
    assert first.newest() is None
    first.check_writable()
    first.save(of_a_run(10), [step_name(10), BEST])
    first.finish()
    second = run.open()
    assert second.newest() is not None
    writing = first.location.put_bytes(b"the rest of its snapshot", FINAL)
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "second")
    second.check_writable()
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "first")
    first.save(of_a_run(20), [step_name(20), BEST])
    with pytest.raises(StorageConflictError, match="job second"):
        first.finish()
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "second")
    second.save(of_a_run(20), [step_name(20), BEST, FINAL])
    second.finish()
    assert open_location(run.uri).stat(FINAL).generation != writing.generation
    assert read_from(f"{run.uri}/{FINAL}", run.workdir).step == 20


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
    tmp_path: Path, gcs_bucket: str, remote: bool, caplog: pytest.LogCaptureFixture
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
    assert f"of step 6, is gone from {uri}; best.pt is of step 4" in caplog.text


@pytest.mark.parametrize("described", [True, False])
def test_what_is_read_is_the_file_that_was_checked(
    described: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job renames its own over it in between."""
    path = tmp_path / "best.pt"
    sidecar = snapshot(1).write(path)
    other = tmp_path / "other"
    other.mkdir()
    Snapshot({"weight": torch.zeros(9)}, None, {}, 1, {}, sidecar.meta).write(other / "best.pt")

    def renamed(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = inner(*arguments)
            (other / "best.pt").replace(path)
            return result

        return call

    if described:
        monkeypatch.setattr(snapshots, "verify_file", renamed(snapshots.verify_file))
        assert read_from(str(path), tmp_path).weights["weight"].shape == (4,)
    else:
        whole = path.read_bytes()
        (tmp_path / "best.pt.meta.json").unlink()
        monkeypatch.setattr(
            snapshots, "read_open_checkpoint", renamed(snapshots.read_open_checkpoint)
        )
        location = open_location(str(tmp_path))
        checkpoint, made = snapshots._describe(location, "best.pt", tmp_path)
        assert checkpoint.weights["weight"].shape == (4,)
        assert made.size == len(whole)
