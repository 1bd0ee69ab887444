"""Background uploads: order, replacement, failure, and what a reader sees in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from tests.faults.proxy import FaultProxy
from trainer.runtime.errors import StorageError
from trainer.storage.base import Entry, Location, Source, StorageConflictError, TransferPolicy
from trainer.storage.files import atomic_write, crc32c_of
from trainer.storage.places import open_location
from trainer.storage.uploads import Uploader

POLICY = TransferPolicy(
    chunk_bytes=256 * 1024, first_delay=0.005, longest_delay=0.05, deadline=20, first_deadline=20
)
SIDECAR = ".meta.json"


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

    def put(self, source: Source, name: str) -> Entry:
        self.started.set()
        self.gate.wait()
        entry = self.inner.put(source, name)
        self.done.append(f"put {name}")
        return entry

    def delete(self, name: str) -> None:
        self.inner.delete(name)
        self.done.append(f"delete {name}")


def watched(uri: str) -> Watched:
    return Watched(open_location(uri, POLICY))


def pair(directory: Path, name: str, content: bytes) -> list[tuple[Path, str]]:
    """Weights and the sidecar that vouches for them."""
    weights, sidecar = directory / name, directory / (name + SIDECAR)
    with atomic_write(weights) as file:
        file.write(content)
    said = {"size": len(content), "crc32c": crc32c_of(weights)}
    with atomic_write(sidecar) as file:
        file.write(json.dumps(said).encode())
    return [(weights, name), (sidecar, name + SIDECAR)]


def test_groups_arrive_in_order_with_removals_behind_them(uri: str, tmp_path: Path) -> None:
    location = watched(uri)
    with Uploader(location) as uploads:
        uploads.submit(pair(tmp_path, "ckpt_step_1.pt", b"1" * 300_000), key="ckpt_step_1.pt")
        uploads.submit(pair(tmp_path, "ckpt_step_2.pt", b"2" * 300_000), key="ckpt_step_2.pt")
        uploads.submit_delete("ckpt_step_1.pt")
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


def test_the_newest_waiting_best_wins_and_the_one_in_flight_is_finished(
    uri: str, tmp_path: Path
) -> None:
    location = watched(uri)
    location.gate.clear()
    with Uploader(location) as uploads:
        assert uploads.submit(pair(tmp_path, "best.pt", b"first"), key="best.pt") == []
        assert location.started.wait(10)
        # The paths are used again, or go, at once: what was submitted has its files open
        assert uploads.submit(pair(tmp_path, "other.pt", b"other")) == []
        for path in tmp_path.glob("*.pt*"):
            path.unlink()
        assert uploads.submit(pair(tmp_path, "best.pt", b"second"), key="best.pt") == []
        dropped = uploads.submit(pair(tmp_path, "best.pt", b"third"), key="best.pt")
        assert dropped == ["best.pt", "best.pt.meta.json"]
        assert uploads.waiting == 3
        location.gate.set()
    puts = [line for line in location.done if line.startswith("put") and SIDECAR not in line]
    assert puts == ["put best.pt", "put other.pt", "put best.pt"]
    reader = open_location(uri, POLICY)
    assert reader.read_bytes("best.pt", limit=10) == b"third"
    assert reader.read_bytes("other.pt", limit=10) == b"other"


def test_a_rename_over_a_file_does_not_tear_its_upload(
    gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    location = open_location(gcs_bucket, POLICY)
    gcs_proxy.bandwidth = 2e6
    with Uploader(location) as uploads:
        uploads.submit(pair(tmp_path, "best.pt", b"a" * 1_000_000))
        while not gcs_proxy.kept:
            threading.Event().wait(0.001)
        other = tmp_path / "other"
        other.write_bytes(b"b" * 1_000_000)
        os.replace(other, tmp_path / "best.pt")
    assert location.read_bytes("best.pt", limit=10**6) == b"a" * 1_000_000


def test_no_sidecar_ever_stands_beside_weights_it_does_not_describe(
    gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
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
            found = {entry.name: entry for entry in reader.list()}
            if "best.pt" not in found or "best.pt" + SIDECAR not in found:
                return " and ".join(found) or "nothing"
            said = json.loads(reader.read_bytes("best.pt" + SIDECAR, limit=1000))
            wrong = found["best.pt"].difference(said["size"], said["crc32c"])
            return f"WRONG: {wrong}" if wrong else f"pair of {said['size']}"
        finally:
            gcs_proxy.ask = ask  # type: ignore[method-assign]

    asking, looked, ended = threading.Event(), threading.Event(), threading.Event()
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    gcs_proxy.ask = ask  # type: ignore[method-assign]
    with Uploader(open_location(gcs_bucket, POLICY)) as uploads:
        uploads.submit(pair(tmp_path, "best.pt", b"1" * 300_000))
        uploads.submit(pair(tmp_path, "best.pt", b"2" * 400_000))
    ended.set()
    asking.set()
    assert states[-1] == "pair of 400000"
    assert "pair of 300000" in states
    assert states.count("best.pt") >= 2, "weights alone, before their sidecar"
    assert not [one for one in states if one.startswith("WRONG")]


def test_a_failure_reaches_the_loop_and_nothing_is_removed_behind_it(
    uri: str, tmp_path: Path
) -> None:
    other = open_location(uri, POLICY)
    location = watched(uri)
    location.list()
    other.put_bytes(b"theirs", "best.pt")
    location.gate.clear()
    uploads = Uploader(location)
    uploads.submit(pair(tmp_path, "ckpt_step_1.pt", b"1"))
    uploads.submit(pair(tmp_path, "best.pt", b"mine"))
    uploads.submit(pair(tmp_path, "ckpt_step_2.pt", b"2"))
    uploads.submit_delete("ckpt_step_1.pt")
    uploads.check()
    location.gate.set()
    with pytest.raises(StorageConflictError, match="best.pt was written by another job"):
        uploads.drain()
    for use in (
        uploads.check,
        uploads.drain,
        lambda: uploads.submit(pair(tmp_path, "x.pt", b"x")),
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
        def put(self, source: Source, name: str) -> Entry:
            raise ZeroDivisionError

    seen: list[type[BaseException] | None] = []
    hook, threading.excepthook = threading.excepthook, lambda one: seen.append(one.exc_type)
    try:
        uploads = Uploader(Broken(open_location(str(tmp_path / "place"))))
        uploads.submit(pair(tmp_path, "best.pt", b"1"))
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
    uploads.submit(pair(tmp_path, "best.pt", b"1"))
    uploads.submit(pair(tmp_path, "final.pt", b"1"))
    with pytest.raises(StorageError, match=r"not at .* after 0.01 s: best.pt, .*final.pt"):
        uploads.drain(timeout=0.01)
    location.gate.set()
    uploads.drain(timeout=20)
    uploads.close()
    with pytest.raises(StorageError, match="have ended"):
        uploads.submit(pair(tmp_path, "late.pt", b"1"))
    assert len(open_location(uri, POLICY).list()) == 4


def test_an_exception_in_the_loop_drops_what_waits(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    location = watched(uri)
    location.gate.clear()

    def loop() -> None:
        with Uploader(location) as uploads:
            uploads.submit(pair(tmp_path, "a.pt", b"1"))
            assert location.started.wait(10)
            uploads.submit(pair(tmp_path, "b.pt", b"2"))
            threading.Timer(0.05, location.gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert [entry.name for entry in open_location(uri, POLICY).list()] == ["a.pt", "a.pt.meta.json"]
    assert "not uploaded" in caplog.text
    assert "b.pt" in caplog.text


def test_a_file_changed_in_place_while_it_waits_fails(tmp_path: Path) -> None:
    location = watched(str(tmp_path / "place"))
    location.gate.clear()
    uploads = Uploader(location)
    uploads.submit(pair(tmp_path, "first.pt", b"first"))
    uploads.submit(pair(tmp_path, "best.pt", b"whole"))
    with open(tmp_path / "best.pt", "r+b") as file:
        file.write(b"other content")
    location.gate.set()
    with pytest.raises(StorageError, match=r"file of best\.pt was changed in place"):
        uploads.drain()
    uploads.close()
    assert "put best.pt" not in location.done


def test_a_file_that_cannot_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    with Uploader(open_location(str(tmp_path / "place"))) as uploads:
        with pytest.raises(StorageError, match=r"gone\.pt.*does not exist"):
            uploads.submit([(tmp_path / "gone.pt", "gone.pt")])
        with pytest.raises(StorageError, match="cannot be the name"):
            uploads.submit([(tmp_path / "gone.pt", "../gone.pt")])


KILLED = """
    import json, os, random, sys
    from pathlib import Path
    from trainer.storage.base import TransferPolicy
    from trainer.storage.files import crc32c_of
    from trainer.storage.places import open_location
    from trainer.storage.uploads import Uploader
    uri, workdir = sys.argv[1], Path(sys.argv[2])
    location = open_location(uri, TransferPolicy(chunk_bytes=256 * 1024, first_delay=0.01))
    location.list()
    with Uploader(location) as uploads:
        for step in range(10**6):
            data = os.urandom(random.randrange(1, 900_000))
            for name in (f"ckpt_best_step{step % 4}.pt", "best.pt"):
                weights, sidecar = workdir / name, workdir / (name + ".meta.json")
                weights.write_bytes(data)
                sidecar.write_text(json.dumps({"size": len(data), "crc32c": crc32c_of(weights)}))
                uploads.submit([(weights, name), (sidecar, sidecar.name)])
                weights.unlink(), sidecar.unlink()
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
            assert got.difference(said["size"], said["crc32c"]) is None
            assert crc32c_of(tmp_path / "copy") == said["crc32c"]
            checked += 1
    return checked


def test_whenever_it_is_killed_every_sidecar_is_true(uri: str, tmp_path: Path) -> None:
    assert killed(uri, tmp_path, 4) >= 4


@pytest.mark.soak
def test_fifty_kills(uri: str, tmp_path: Path) -> None:
    checked = killed(uri, tmp_path, 50)
    print(f"\n50 kills; {checked} sidecars, each beside the weights it describes")
