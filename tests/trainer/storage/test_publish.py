"""Outputs of several files, of every kind of place: whole or absent, and nothing left beside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.faults.proxy import FaultProxy
from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.names import BEST, best_name
from trainer.checkpoints.snapshots import Snapshots, read_from
from trainer.runtime.errors import StorageError, UsageError
from trainer.storage import places
from trainer.storage.base import StorageConflictError
from trainer.storage.local import LocalLocation
from trainer.storage.places import (
    check_output_file,
    fetch_directory,
    is_empty,
    is_remote,
    open_location,
)
from trainer.storage.publish import publishing


@pytest.fixture(params=["local", "gs"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "deep" / "output")
    return f"{request.getfixturevalue('gcs_bucket')}/output"


def content(output: str) -> dict[str, bytes]:
    """By name, what is there, one folder down included."""
    found = {}
    for folder in ("", "/tokenizer"):
        location = open_location(output + folder)
        for entry in location.list():
            found[f"{folder}/{entry.name}"[1:] if folder else entry.name] = location.read_bytes(
                entry.name, limit=100
            )
    return found


def write(directory: Path, mark: bytes) -> None:
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab").write_bytes(mark)
    (directory / "a.json").write_bytes(mark)
    (directory / "train.bin").write_bytes(mark)


def test_a_directory_is_there_when_the_block_has_ended(output: str, tmp_path: Path) -> None:
    assert is_empty(output)
    with publishing(output, last="a.json", workdir=tmp_path / "work") as directory:
        write(directory, b"1")
        assert is_empty(output)
    expected = {"a.json": b"1", "train.bin": b"1", "tokenizer/vocab": b"1"}
    assert content(output) == expected
    assert not is_empty(output)
    assert not list(tmp_path.rglob(".publish-*"))


def test_a_failure_leaves_nothing(output: str, tmp_path: Path) -> None:
    def fail() -> None:
        with publishing(output, last="a.json", workdir=tmp_path / "work") as directory:
            write(directory, b"1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_empty(output)
    assert not list(tmp_path.rglob(".publish-*"))


def test_the_last_file_comes_last(gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path) -> None:
    """And what a killed attempt has left is replaced."""
    open_location(gcs_bucket).put_bytes(b"half", "train.bin")
    with publishing(gcs_bucket, last="a.json", workdir=tmp_path) as directory:
        write(directory, b"whole")
        gcs_proxy.requests.clear()
    sent = [path for method, path in gcs_proxy.requests if method == "POST"]
    assert len(sent) == 3
    entries = {entry.name: entry for entry in open_location(gcs_bucket).list()}
    assert entries["a.json"].generation > entries["train.bin"].generation
    assert content(gcs_bucket)["train.bin"] == b"whole"


def test_what_another_job_writes_meanwhile_stays(gcs_bucket: str, tmp_path: Path) -> None:
    def race() -> None:
        with publishing(gcs_bucket, last="a.json", workdir=tmp_path) as directory:
            write(directory, b"mine")
            open_location(gcs_bucket).put_bytes(b"theirs", "a.json")

    with pytest.raises(StorageConflictError):
        race()
    assert content(gcs_bucket)["a.json"] == b"theirs"


def test_a_local_directory_in_use_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    with publishing(str(tmp_path / "output"), last="a.json", workdir=tmp_path) as directory:
        write(directory, b"1")  # an empty one will do
    with (
        pytest.raises(StorageError, match="is not empty; give a new directory"),
        publishing(str(tmp_path / "output"), last="a.json", workdir=tmp_path),
    ):
        raise AssertionError("the work has begun")


def test_files_beside_others_replace_those_of_their_names(output: str, tmp_path: Path) -> None:
    place = open_location(output)
    place.put_bytes(b"old", "metrics.md")
    place.put_bytes(b"other", "notes.txt")
    with publishing(
        output, last="metrics.md", workdir=tmp_path / "work", replacing=True
    ) as directory:
        (directory / "metrics.json").write_bytes(b"new")
        (directory / "metrics.md").write_bytes(b"new")
    assert content(output) == {
        "metrics.json": b"new",
        "metrics.md": b"new",
        "notes.txt": b"other",
    }
    assert not list(tmp_path.rglob(".publish-*"))


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with publishing(str(tmp_path / "out"), last="a.json", workdir=tmp_path) as directory:
            write(directory, b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


KILLED = """
    import sys, time
    from pathlib import Path
    from trainer.storage.publish import publishing
    with publishing(sys.argv[1], last="a.json", workdir=Path(sys.argv[2])) as directory:
        (directory / "train.bin").write_bytes(b"half")
        print("writing", flush=True)
        time.sleep(60)
    """


def test_what_a_killed_process_left_is_cleared_by_the_next(output: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), output, str(tmp_path / "work")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.rglob(".publish-*"))) == 1
    assert is_empty(output)
    with publishing(output, last="a.json", workdir=tmp_path / "work") as directory:
        write(directory, b"1")
    assert not list(tmp_path.rglob(".publish-*"))
    assert content(output)["a.json"] == b"1"


def test_a_directory_is_fetched_once_for_each_version(output: str, tmp_path: Path) -> None:
    names, work = ("train.bin", "a.json"), tmp_path / "work"
    for mark in (b"1", b"2"):
        with publishing(output, last="a.json", workdir=work, replacing=True) as directory:
            write(directory, mark)
            (directory / "tokenizer" / "vocab").unlink()
        first = fetch_directory(output, names, work, limit=100)
        assert (first / "train.bin").read_bytes() == mark
        stamp = (first / "train.bin").stat().st_mtime_ns
        again = fetch_directory(output, names, work, limit=100)
        assert (again, (again / "train.bin").stat().st_mtime_ns) == (first, stamp)
    assert (fetch_directory(output, names, work, limit=100) == Path(output)) != is_remote(output)


def test_half_a_directory_is_fetched_anew_and_older_versions_go(
    gcs_bucket: str, tmp_path: Path
) -> None:
    names, work = ("train.bin", "a.json"), tmp_path / "work"
    location = open_location(gcs_bucket)

    def version(mark: bytes) -> Path:
        location.put_bytes(mark * 10, "train.bin")
        location.put_bytes(mark, "a.json")
        return fetch_directory(gcs_bucket, names, work, limit=100)

    first = version(b"1")
    (first / "a.json").unlink()  # as a kill leaves it
    (first / "train.bin").write_bytes(b"cut")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    half = work / f".fetch-{socket.gethostname()}-{ended.pid}-a"
    half.mkdir()
    (half / "train.bin").write_bytes(b"half")
    assert fetch_directory(gcs_bucket, names, work, limit=100) == first
    assert (first / "train.bin").read_bytes() == b"1" * 10
    assert [path.name for path in work.iterdir()] == [first.name]
    second = version(b"2")
    assert [path.name for path in work.iterdir()] == [second.name] != [first.name]


def test_a_file_that_cannot_be_written_is_told_first(tmp_path: Path, gcs_bucket: str) -> None:
    (tmp_path / "directory").mkdir()
    for uri, line in (
        (str(tmp_path / "directory"), "is a directory; give the path of the file"),
        (f"{gcs_bucket}/.hidden", "starts with a dot"),
        (gcs_bucket, "names no file"),
        ("s3://bucket/x.pt", "neither gs://bucket/path nor a local path"),
    ):
        with pytest.raises((UsageError, StorageError), match=line):
            check_output_file(uri)
    check_output_file(str(tmp_path / "new" / "x.pt"))
    check_output_file(f"{gcs_bucket}/x.pt")
    assert sorted(os.listdir(tmp_path)) == ["directory"]


def test_another_backend_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots, publishing and reading ask for nothing but a `Location`."""

    class Disk(LocalLocation):
        def __init__(self, uri: str) -> None:
            super().__init__(str(tmp_path / "disk" / uri.partition("://")[2]))
            self._uri = uri

        @property
        def uri(self) -> str:
            return self._uri

        def child(self, name: str) -> str:
            return f"{self._uri}/{name}"

    monkeypatch.setitem(places.BACKENDS, "disk", lambda uri, _: Disk(uri))
    with publishing("disk://a/output", last="a.json", workdir=tmp_path) as directory:
        write(directory, b"1")
    assert content("disk://a/output")["tokenizer/vocab"] == b"1"
    snapshots = Snapshots("disk://a/run", str(tmp_path / "work"))
    meta = {"step": 3, "metrics": {}}
    snapshot = Snapshot({"weight": torch.ones(4)}, None, {}, 3, {}, meta)
    snapshots.save(snapshot, [best_name(3, 1.0), BEST])
    snapshots.finish()
    assert read_from("disk://a/run/best.pt", tmp_path / "work").step == 3
    newest = Snapshots("disk://a/run", str(tmp_path / "work")).newest()
    assert newest is not None
    assert newest.source.startswith("disk://a/run/")
