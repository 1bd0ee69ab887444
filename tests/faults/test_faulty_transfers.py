"""The real client against a real object server through a faulty network: nothing lost or corrupt.

pytest tests/faults                  tens of faults
pytest tests/faults -m soak -s       1,000 faults; prints the counts by kind
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.pairs import SIDECAR, Pairs, difference, sidecar_of
from tests.faults.proxy import ANY, KINDS, UPLOAD, FaultProxy, Faults
from tests.faults.server import ObjectServer
from trainer.runtime.errors import StorageError
from trainer.storage.base import Location, StorageMissingError, TransferPolicy
from trainer.storage.files import crc32c_of, crc32c_of_bytes
from trainer.storage.places import open_location
from trainer.storage.uploads import Uploader

KIB = 1024
FAST = TransferPolicy(
    chunk_bytes=256 * KIB,
    range_bytes=256 * KIB,
    threads=3,
    connect_timeout=5.0,
    read_timeout=0.4,
    first_delay=0.005,
    longest_delay=0.05,
    deadline=60.0,
    first_deadline=60.0,
)


class Writer:
    """Writes checkpoints as a run does: a rolling best, numbered ones, and their removal."""

    def __init__(self, uri: str, workdir: Path, seed: int) -> None:
        self.location = open_location(uri, FAST)
        self.expected: dict[str, bytes] = {}
        self._workdir, self._random = workdir, random.Random(seed)
        workdir.mkdir()

    def run(self, steps: int) -> None:
        self.location.list()
        uploads = Uploader(self.location)
        pairs = Pairs(uploads, self.location, self._workdir)
        for step in range(steps):
            # From one request to several chunks, often not a whole number of them
            size = self._random.choice((1_000, 300_000, 512 * KIB, 900_001))
            data = self._random.randbytes(size)
            names = (f"ckpt_step_{step}.pt", "best.pt")
            pairs.submit(data, *names)
            for name in names:
                self.expected[name] = data
                self.expected[name + SIDECAR] = sidecar_of(data, crc32c_of_bytes(data))
            if step >= 2:
                for name in (f"ckpt_step_{step - 2}.pt{SIDECAR}", f"ckpt_step_{step - 2}.pt"):
                    uploads.submit_delete(name)
                    del self.expected[name]
        uploads.drain()
        uploads.close()


class Reader(threading.Thread):
    """Reads pairs of weights and sidecar all the while, as evaluation of a live run does."""

    def __init__(self, uri: str, workdir: Path) -> None:
        super().__init__(name="reader")
        self.location, self.workdir = open_location(uri, FAST), workdir
        self.ending = threading.Event()
        self.outcomes: Counter[str] = Counter()
        workdir.mkdir()

    def run(self) -> None:
        while not self.ending.is_set():
            for entry in self.location.list():
                if entry.name.endswith(".pt"):
                    self.outcomes[self.read_pair(entry.name)] += 1

    def read_pair(self, name: str) -> str:
        path = self.workdir / name
        try:
            said = json.loads(self.location.read_bytes(f"{name}.meta.json", limit=1000))
            got = self.location.get(name, path)
        except StorageMissingError:
            return "passed over: not there"
        if difference(got, said):
            return "passed over: differs"
        whole = (path.stat().st_size, crc32c_of(path)) == (said["size"], said["crc32c"])
        return "whole" if whole else "CORRUPT"


def losses(location: Location, expected: dict[str, bytes]) -> list[str]:
    """Names that are missing, that should be gone, or that hold something else."""
    found = {entry.name for entry in location.list()}
    wrong = sorted(found ^ set(expected))
    return wrong + [
        name
        for name in sorted(found & set(expected))
        if location.read_bytes(name, limit=10**7) != expected[name]
    ]


def faulty_run(
    proxy: FaultProxy, uri: str, workdir: Path, faults: Faults, *, seed: int, steps: int = 3
) -> Counter[str]:
    """One run under faults; afterwards everything is read without any."""
    workdir.mkdir()
    writer = Writer(uri, workdir / "writer", seed)
    reader = Reader(uri, workdir / "reader")
    with proxy.injecting(faults):
        reader.start()
        try:
            writer.run(steps)
        finally:
            reader.ending.set()
            reader.join()
    assert losses(open_location(uri, FAST), writer.expected) == []
    assert reader.outcomes["CORRUPT"] == 0
    assert [path.name for path in workdir.rglob("*.tmp")] == []
    return reader.outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_fault_is_survived(
    kind: str, gcs_proxy: FaultProxy, gcs_bucket: str, tmp_path: Path
) -> None:
    faults = Faults(seed=1, rate=0.4, kinds=(kind,), limit=6)
    faulty_run(gcs_proxy, f"{gcs_bucket}/run", tmp_path / "run", faults, seed=2)
    assert faults.counts[kind] >= 1, "the fault never happened: this proves nothing"


def test_all_kinds_mixed(gcs_proxy: FaultProxy, gcs_bucket: str, tmp_path: Path) -> None:
    faults = Faults(seed=3, rate=0.3, limit=40)
    outcomes = faulty_run(gcs_proxy, f"{gcs_bucket}/run", tmp_path / "run", faults, seed=4, steps=6)
    assert faults.counts.total() >= 20
    assert outcomes["whole"] >= 1


def test_a_resumed_upload_sends_only_what_is_missing(
    gcs_proxy: FaultProxy, gcs_bucket: str, tmp_path: Path
) -> None:
    source = tmp_path / "weights.pt"
    source.write_bytes(os.urandom(4 * 1024 * KIB + 12_345))
    policy = TransferPolicy(
        chunk_bytes=512 * KIB, read_timeout=5, first_delay=0.005, longest_delay=0.05
    )
    faults = Faults(seed=5, rate=0.6, kinds=("reset in mid-upload", "answer lost"), limit=8)
    with gcs_proxy.injecting(faults):
        entry = open_location(gcs_bucket, policy).put(source, "weights.pt")
    assert faults.counts.total() == 8
    assert (entry.size, entry.crc32c) == (source.stat().st_size, crc32c_of(source))
    # The parts that were kept follow each other without a gap, from begin to end, in one upload
    kept = gcs_proxy.kept
    assert [end for _, end in kept[:-1]] == [first for first, _ in kept[1:]]
    assert (kept[0][0], kept[-1][1]) == (0, entry.size)
    assert gcs_proxy.repeated == 0


@pytest.mark.parametrize("size", [1_000, 700_000])
def test_a_write_whose_answer_is_lost_counts_as_done(
    size: int, gcs_proxy: FaultProxy, gcs_bucket: str, tmp_path: Path
) -> None:
    source = tmp_path / "weights.pt"
    location = open_location(gcs_bucket, FAST)
    location.list()
    lost = 0
    for seed in range(6):
        source.write_bytes(os.urandom(size))
        # Among them the answer to the last part, which is the one that makes the object
        faults = Faults(seed=seed, rate=0.7, kinds=("answer lost",), limit=5)
        with gcs_proxy.injecting(faults):
            entry = location.put(source, "best.pt")
        assert entry.crc32c == crc32c_of(source)
        lost += faults.counts.total()
    assert lost >= 6
    assert open_location(gcs_bucket, FAST).stat("best.pt").generation == entry.generation


@pytest.mark.parametrize("parts", [False, True])
def test_a_copy_whose_answer_is_lost_counts_as_done(
    parts: bool, gcs_proxy: FaultProxy, gcs_bucket: str
) -> None:
    location = open_location(gcs_bucket, FAST)
    original = location.put_bytes(b"content" * 1000, "ckpt_step_1.pt")
    gcs_proxy.copies_in_parts = parts
    lost = 0
    for seed in range(6):
        faults = Faults(seed=seed, rate=0.7, kinds=("answer lost", "503"), only=(ANY,), limit=5)
        with gcs_proxy.injecting(faults):
            entry = location.copy(original, "best.pt")
        assert (entry.name, entry.size, entry.crc32c) == ("best.pt", 7000, original.crc32c)
        lost += faults.counts["answer lost"]
    assert lost >= 6
    reader = open_location(gcs_bucket, FAST)
    assert reader.stat("best.pt").generation == entry.generation
    assert reader.read_bytes("best.pt", limit=7000) == b"content" * 1000


def test_a_write_that_arrived_is_not_sent_again(gcs_proxy: FaultProxy, gcs_bucket: str) -> None:
    location = open_location(gcs_bucket, FAST)
    lose = Faults(seed=0, rate=1.0, kinds=("answer lost",), only=(UPLOAD,), limit=1)
    with gcs_proxy.injecting(lose) as faults:
        entry = location.put_bytes(b"content", "sidecar.json")
    assert faults.counts.total() == 1
    # The first, which arrived; the second, refused because it had
    assert [method for method, _ in gcs_proxy.requests].count("POST") == 2
    assert location.stat("sidecar.json").generation == entry.generation


def test_an_own_write_that_was_given_up_is_no_foreign_one(
    gcs_proxy: FaultProxy, gcs_bucket: str
) -> None:
    location = open_location(gcs_bucket, replace(FAST, deadline=0.05, first_deadline=0.05))
    with (
        gcs_proxy.injecting(Faults(seed=0, rate=1.0, kinds=("answer lost",))),
        pytest.raises(StorageError, match="given up"),
    ):
        location.put_bytes(b"arrived, but who knows", "best.pt")
    location.put_bytes(b"next", "best.pt")
    assert open_location(gcs_bucket, FAST).read_bytes("best.pt", limit=10) == b"next"


@pytest.mark.parametrize("status", [308, 503])
@pytest.mark.timeout(60)
def test_an_upload_that_gets_nowhere_is_given_up(
    status: int, gcs_proxy: FaultProxy, gcs_bucket: str, tmp_path: Path
) -> None:
    """The server answers every chunk, and every question where it stands; it just takes nothing."""
    source = tmp_path / "weights.pt"
    source.write_bytes(os.urandom(600 * KIB))
    location = open_location(gcs_bucket, replace(FAST, deadline=0.3))
    location.list()
    gcs_proxy.chunk_status = status
    with pytest.raises(StorageError, match=r"weights\.pt was given up after repeated tries"):
        location.put(source, "weights.pt")
    gcs_proxy.chunk_status = None
    assert location.put(source, "weights.pt").crc32c == crc32c_of(source)


def test_a_transfer_that_moves_is_not_given_up(
    gcs_proxy: FaultProxy, gcs_bucket: str, tmp_path: Path
) -> None:
    """Each try breaks off, and all of them together take many times the deadline."""
    source = tmp_path / "weights.pt"
    source.write_bytes(os.urandom(1000 * KIB))
    policy = replace(FAST, range_bytes=1024 * KIB, first_delay=0.02, deadline=0.05)
    location = open_location(gcs_bucket, policy)
    location.put(source, "weights.pt")
    asked = gcs_proxy.ask

    def ask(method: str, path: str, body: bytes, headers: dict[str, str]):  # type: ignore[no-untyped-def]
        status, answer_headers, answer = asked(method, path, body, headers)
        return status, answer_headers, answer[: 20 * KIB] if "alt=media" in path else answer

    gcs_proxy.ask = ask  # type: ignore[method-assign]
    location.get("weights.pt", tmp_path / "copy.pt")
    assert (tmp_path / "copy.pt").read_bytes() == source.read_bytes()


def test_a_shortened_answer_is_continued_where_it_ended(
    gcs_proxy: FaultProxy, gcs_bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "weights.pt"
    source.write_bytes(os.urandom(2 * 1024 * KIB))
    open_location(gcs_bucket, FAST).put(source, "weights.pt")
    with gcs_proxy.injecting(Faults(seed=1, rate=0.6, kinds=("short download",))) as faults:
        open_location(gcs_bucket, FAST).get("weights.pt", tmp_path / "copy.pt")
    assert faults.counts.total() >= 4
    assert (tmp_path / "copy.pt").read_bytes() == source.read_bytes()
    assert "bytes early; trying again" in caplog.text
    assert "arrived damaged" not in caplog.text


def test_an_upload_that_the_server_forgot_starts_anew(
    gcs_proxy: FaultProxy, gcs_bucket: str, tmp_path: Path
) -> None:
    source = tmp_path / "weights.pt"
    source.write_bytes(os.urandom(1024 * KIB))
    location = open_location(gcs_bucket, FAST)
    forgotten = threading.Event()

    def forget() -> None:
        while not gcs_proxy.kept:
            forgotten.wait(0.001)
        gcs_proxy.uploads.clear()
        forgotten.set()

    gcs_proxy.bandwidth = 4e6  # slow enough for the upload to be under way
    thread = threading.Thread(target=forget)
    thread.start()
    entry = location.put(source, "weights.pt")
    thread.join()
    begun = [path for method, path in gcs_proxy.requests if method == "POST"]
    assert len(begun) == 2
    assert entry.crc32c == crc32c_of(source)


@pytest.fixture
def soak_proxy(
    object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    with FaultProxy(object_server.url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_thousand_faults(
    soak_proxy: FaultProxy, object_server: ObjectServer, tmp_path: Path
) -> None:
    counts: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    runs = 0
    while counts.total() < 1000:
        runs += 1
        bucket = f"soak-{runs}"
        object_server.make_bucket(bucket)
        faults = Faults(seed=1000 + runs, rate=0.25)
        outcomes += faulty_run(
            soak_proxy, f"gs://{bucket}/run", tmp_path / str(runs), faults, seed=runs, steps=6
        )
        counts += faults.counts
    print(f"\n{counts.total()} faults in {runs} runs; 0 lost, 0 corrupt")
    for kind, number in counts.most_common():
        print(f"  {number:5d}  {kind}")
    print("read by a concurrent reader:", dict(outcomes))
    assert all(counts[kind] for kind in KINDS)
