"""Background uploads: order, replacement, failure, and what a reader sees in between."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.pairs import SIDECAR, Pairs, difference
from tests.faults.proxy import FaultProxy
from trainer.runtime.errors import StorageError
from trainer.storage.base import Entry, Location, StorageConflictError, TransferPolicy
from trainer.storage.files import crc32c_of
from trainer.storage.places import open_location
from trainer.storage.uploads import Uploader

POLICY = TransferPolicy(
    chunk_bytes=256 * 1024, first_delay=0.005, longest_delay=0.05, deadline=20, first_deadline=20
)


@pytest.fixture(params=["local", "gs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of either kind."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('gcs_bucket')}/run"


class Watched:
    """A location that notes what is done to it, and holds every write until `gate` is set."""

    def __init__(self, inner: Location) -> None:
        self.inner = inner
        self.done: list[str] = []
        self.started = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def adopt(self, path: Path, name: str, crc32c: str) -> Entry:
        return self._noted(f"put {name}", lambda: self.inner.adopt(path, name, crc32c))

    def copy(self, original: Entry, name: str) -> Entry:
        return self._noted(f"copy {name}", lambda: self.inner.copy(original, name))

    def put_bytes(self, data: bytes, name: str) -> Entry:
        return self._noted(f"put {name}", lambda: self.inner.put_bytes(data, name))

    def _noted(self, what: str, write: Callable[[], Entry]) -> Entry:
        self.started.set()
        self.gate.wait()
        entry = write()
        self.done.append(what)
        return entry

    def delete(self, name: str) -> None:
        self.inner.delete(name)
        self.done.append(f"delete {name}")


def watched(uri: str) -> Watched:
    return Watched(open_location(uri, POLICY))


def test_groups_arrive_in_order_with_removals_behind_them(uri: str, tmp_path: Path) -> None:
    location = watched(uri)
    uploads = Uploader(location)
    pairs = Pairs(uploads, location, tmp_path)
    pairs.submit(b"1" * 300_000, "ckpt_step_1.pt", key="ckpt_step_1.pt")
    pairs.submit(b"2" * 300_000, "ckpt_step_2.pt", key="ckpt_step_2.pt")
    uploads.submit_delete("ckpt_step_1.pt")
    uploads.drain()
    uploads.close()
    assert location.done == [
        "delete ckpt_step_1.pt.meta.json",
        "put ckpt_step_1.pt",
        "put ckpt_step_1.pt.meta.json",
        "delete ckpt_step_2.pt.meta.json",
        "put ckpt_step_2.pt",
        "put ckpt_step_2.pt.meta.json",
        "delete ckpt_step_1.pt",
    ]
    found = [entry.name for entry in open_location(uri, POLICY).list()]
    assert found == ["ckpt_step_1.pt.meta.json", "ckpt_step_2.pt", "ckpt_step_2.pt.meta.json"]


def test_only_what_goes_elsewhere_is_called_uploaded(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    uploads = Uploader(open_location(uri, POLICY))
    place = open_location(uri, POLICY)
    uploads.submit(["a.pt"], lambda: [lambda name: place.put_bytes(b"x" * 100_000, name)])
    uploads.drain()
    uploads.close()
    (line,) = [line for line in caplog.messages if "a.pt" in line]
    assert line.startswith(f"{'uploaded' if '://' in uri else 'saved'} {uri}/a.pt: 0.1 MB")
    assert (" in " in line) == ("://" in uri)


def test_the_newest_waiting_best_wins_and_the_one_in_flight_is_finished(
    uri: str, tmp_path: Path
) -> None:
    location = watched(uri)
    location.gate.clear()
    uploads = Uploader(location)
    pairs = Pairs(uploads, location, tmp_path)
    assert pairs.submit(b"first", "best.pt", key="best.pt") == []
    assert location.started.wait(10)
    assert pairs.submit(b"other", "other.pt") == []
    assert pairs.submit(b"second", "best.pt", key="best.pt") == []
    dropped = pairs.submit(b"third", "best.pt", key="best.pt")
    assert dropped == ["best.pt", "best.pt.meta.json"]
    location.gate.set()
    uploads.drain()
    uploads.close()
    puts = [line for line in location.done if line.startswith("put") and SIDECAR not in line]
    assert puts == ["put best.pt", "put other.pt", "put best.pt"]
    reader = open_location(uri, POLICY)
    assert reader.read_bytes("best.pt", limit=10) == b"third"
    assert reader.read_bytes("other.pt", limit=10) == b"other"


def test_an_extra_file_ends_nothing_where_it_fails(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    location = watched(uri)
    location.gate.clear()
    uploads = Uploader(location)
    pairs = Pairs(uploads, location, tmp_path)
    uploads.submit_extra("first.bin", lambda name: location.put_bytes(b"whole", name))
    assert location.started.wait(10)
    uploads.submit_extra("second.bin", lambda name: location.put_bytes(b"", "../out"))
    uploads.submit_extra("third.bin", lambda name: 1 / 0)  # type: ignore[arg-type, return-value]
    pairs.submit(b"weights", "best.pt")
    assert uploads.unsent() == ["best.pt", "best.pt.meta.json"], "no one misses the others"
    location.gate.set()
    uploads.drain()
    uploads.close()
    assert open_location(uri, POLICY).read_bytes("first.bin", limit=10) == b"whole"
    assert open_location(uri, POLICY).read_bytes("best.pt", limit=10) == b"weights"
    told = [message for message in caplog.messages if "is not kept" in message]
    assert [name for line in told for name in ("second.bin", "third.bin") if name in line] == [
        "second.bin",
        "third.bin",
    ]


def test_a_rename_over_a_file_does_not_tear_its_upload(
    gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    location = open_location(gcs_bucket, POLICY)
    gcs_proxy.bandwidth = 2e6
    weights = tmp_path / "best.pt"
    weights.write_bytes(b"a" * 1_000_000)
    uploads = Uploader(location)
    uploads.submit(["best.pt"], lambda: [partial(location.put, weights)])
    while not gcs_proxy.kept:
        threading.Event().wait(0.001)
    other = tmp_path / "other"
    other.write_bytes(b"b" * 1_000_000)
    os.replace(other, weights)
    uploads.drain()
    uploads.close()
    assert location.read_bytes("best.pt", limit=10**6) == b"a" * 1_000_000


@pytest.mark.parametrize("names", [["best.pt"], ["ckpt_step_2.pt", "best.pt"]])
def test_no_sidecar_ever_stands_beside_weights_it_does_not_describe(
    names: list[str], gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Looks at the bucket between every two requests of the replacement."""
    reader = open_location(gcs_bucket, POLICY)
    states: list[str] = []
    asked = gcs_proxy.ask

    def ask(method: str, path: str, body: bytes, headers: dict[str, str]):  # type: ignore[no-untyped-def]
        answer = asked(method, path, body, headers)
        if threading.current_thread() is not looking and method in ("POST", "PUT", "DELETE"):
            asking.set()
            looked.wait(20)
            looked.clear()
        return answer

    def look() -> None:
        while True:
            asking.wait()
            asking.clear()
            if ended.is_set():
                return
            states.append(state())
            looked.set()

    def state() -> str:
        gcs_proxy.ask = asked  # type: ignore[method-assign]
        try:
            every = {entry.name: entry for entry in reader.list()}
            found = {name: entry for name, entry in every.items() if name.startswith("best.pt")}
            if "best.pt" not in found or "best.pt" + SIDECAR not in found:
                return " and ".join(found) or "nothing"
            said = json.loads(reader.read_bytes("best.pt" + SIDECAR, limit=1000))
            wrong = difference(found["best.pt"], said)
            return f"WRONG: {wrong}" if wrong else f"pair of {said['size']}"
        finally:
            gcs_proxy.ask = ask  # type: ignore[method-assign]

    asking, looked, ended = threading.Event(), threading.Event(), threading.Event()
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    gcs_proxy.ask = ask  # type: ignore[method-assign]
    location = open_location(gcs_bucket, POLICY)
    uploads = Uploader(location)
    pairs = Pairs(uploads, location, tmp_path)
    pairs.submit(b"1" * 300_000, "best.pt")
    pairs.submit(b"2" * 400_000, *names)
    uploads.drain()
    uploads.close()
    ended.set()
    asking.set()
    assert states[-1] == "pair of 400000"
    assert "pair of 300000" in states
    assert states.count("best.pt") >= 2, "weights alone, before their sidecar"
    assert not [one for one in states if one.startswith("WRONG")]


@pytest.mark.parametrize("copied", [[], ["best.pt"]], ids=["sent", "copied"])
def test_a_failure_reaches_the_loop_and_nothing_is_removed_behind_it(
    copied: list[str], uri: str, tmp_path: Path
) -> None:
    other = open_location(uri, POLICY)
    location = watched(uri)
    location.list()
    other.put_bytes(b"theirs", "best.pt")
    location.gate.clear()
    uploads = Uploader(location)
    pairs = Pairs(uploads, location, tmp_path)
    pairs.submit(b"1", "ckpt_step_1.pt", *copied)
    pairs.submit(b"mine", "best.pt")
    pairs.submit(b"2", "ckpt_step_2.pt")
    uploads.submit_delete("ckpt_step_1.pt")
    uploads.check()
    location.gate.set()
    with pytest.raises(StorageConflictError, match="best.pt was written by another job"):
        uploads.drain()
    for use in (
        uploads.check,
        uploads.drain,
        lambda: pairs.submit(b"x", "x.pt"),
        lambda: uploads.submit_delete("ckpt_step_1.pt"),
    ):
        with pytest.raises(StorageConflictError):
            use()
    uploads.close()
    found = open_location(uri, POLICY)
    names = [entry.name for entry in found.list()]
    assert names == ["best.pt", "ckpt_step_1.pt", "ckpt_step_1.pt.meta.json"]
    assert found.read_bytes("best.pt", limit=10) == b"theirs"


def test_a_defect_in_the_thread_is_not_silent(tmp_path: Path) -> None:
    class Broken(Watched):
        def adopt(self, path: Path, name: str, crc32c: str) -> Entry:
            raise ZeroDivisionError

    seen: list[type[BaseException] | None] = []
    hook, threading.excepthook = threading.excepthook, lambda one: seen.append(one.exc_type)
    try:
        location = Broken(open_location(str(tmp_path / "place")))
        uploads = Uploader(location)
        Pairs(uploads, location, tmp_path).submit(b"1", "best.pt")
        with pytest.raises(StorageError, match="ended by a defect"):
            uploads.drain()
        uploads.close()
    finally:
        threading.excepthook = hook
    assert seen == [ZeroDivisionError]


def test_the_end_does_not_wait_for_ever(uri: str, tmp_path: Path) -> None:
    location = watched(uri)
    location.gate.clear()
    uploads = Uploader(location)
    pairs = Pairs(uploads, location, tmp_path)
    pairs.submit(b"1", "best.pt", "final.pt")
    with pytest.raises(StorageError, match=r"not at .* after 0.01 s: best.pt, .*final.pt"):
        uploads.drain(timeout=0.01)
    location.gate.set()
    uploads.drain(timeout=20)
    uploads.close()
    with pytest.raises(StorageError, match="have ended"):
        pairs.submit(b"1", "late.pt")
    assert len(open_location(uri, POLICY).list()) == 4


def test_what_waits_at_the_end_is_dropped_and_named(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    location = watched(uri)
    location.gate.clear()
    uploads = Uploader(location)
    pairs = Pairs(uploads, location, tmp_path)
    pairs.submit(b"1", "a.pt")
    assert location.started.wait(10)
    pairs.submit(b"2", "b.pt")
    threading.Timer(0.05, location.gate.set).start()
    uploads.close()
    assert [entry.name for entry in open_location(uri, POLICY).list()] == ["a.pt", "a.pt.meta.json"]
    assert "not written" in caplog.text
    assert "b.pt" in caplog.text


def test_a_name_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    location = open_location(str(tmp_path / "place"))
    uploads = Uploader(location)
    with pytest.raises(StorageError, match="cannot be the name"):
        Pairs(uploads, location, tmp_path).submit(b"x", "../gone.pt")
    uploads.close()


KILLED = """
    import os, random, sys
    from pathlib import Path
    from tests.faults.pairs import Pairs
    from trainer.storage.base import TransferPolicy
    from trainer.storage.places import open_location
    from trainer.storage.uploads import Uploader
    uri, workdir = sys.argv[1], Path(sys.argv[2])
    location = open_location(uri, TransferPolicy(chunk_bytes=256 * 1024, first_delay=0.01))
    location.list()
    uploads = Uploader(location)
    for step in range(10**6):
        data = os.urandom(random.randrange(1, 900_000))
        Pairs(uploads, location, workdir).submit(data, f"ckpt_best_step{step % 4}.pt", "best.pt")
        uploads.drain()
        print(step, flush=True)
    """


def killed(uri: str, tmp_path: Path, times: int) -> int:
    """One job, killed again and again, each time going on over its own files; sidecars checked."""
    work = tmp_path / "work"
    work.mkdir()
    moments = random.Random(times)
    checked = 0
    for _ in range(times):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), uri, str(work)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as job:
            assert job.stdout is not None
            assert job.stdout.readline(), "it must have got somewhere before it is killed"
            threading.Event().wait(moments.uniform(0, 0.3))
            job.send_signal(signal.SIGKILL)
        assert job.returncode == -signal.SIGKILL
        reader = open_location(uri, POLICY)
        found = {entry.name for entry in reader.list()}
        sidecars = [name for name in found if name.endswith(SIDECAR)]
        # best.pt may just be without one; the numbered ones it was copied from are not
        assert [name for name in sidecars if name.startswith("ckpt_best")]
        for name in sidecars:
            said = json.loads(reader.read_bytes(name, limit=1000))
            got = reader.get(name.removesuffix(SIDECAR), tmp_path / "copy")
            assert not difference(got, said)
            assert crc32c_of(tmp_path / "copy") == said["crc32c"]
            checked += 1
    return checked


def test_whenever_it_is_killed_every_sidecar_is_true(uri: str, tmp_path: Path) -> None:
    assert killed(uri, tmp_path, 4) >= 4


@pytest.mark.soak
def test_fifty_kills(uri: str, tmp_path: Path) -> None:
    checked = killed(uri, tmp_path, 50)
    print(f"\n50 kills; {checked} sidecars, each beside the weights it describes")
