"""Reading targets: every window's own records, verified, ahead of their use, from any place."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.faults.proxy import DOWNLOAD, FaultProxy, Faults
from trainer.runtime.errors import DataError, StorageError
from trainer.storage.base import Location, TransferPolicy
from trainer.storage.places import open_location
from trainer.targets import reading
from trainer.targets.reading import Targets
from trainer.targets.shards import read_index

CONTEXT, SIZE = 64, 64

Open = Callable[..., Targets]


@pytest.fixture
def open_targets(tmp_path: Path) -> Iterator[Open]:
    opened: list[Targets] = []

    def open_at(uri: str | Path, block_size: int = 32, **options: Any) -> Targets:
        options = {"max_tokens": 0, "workdir": tmp_path / "work", "copying": True} | options
        opened.append(Targets(read_index(str(uri)), block_size, **options))
        return opened[-1]

    yield open_at
    for targets in opened:
        targets.close()


def records_of(several_shards: Path) -> np.ndarray:
    """Every record in its place, read without any of the program's arithmetic of windows."""
    rows = []
    for path in sorted(several_shards.glob("train-*.bin")):
        data = path.read_bytes()
        while data:
            window, data = data[: CONTEXT * SIZE + 4], data[CONTEXT * SIZE + 4 :]
            rows.append(np.frombuffer(window[:-4], dtype=np.uint8).reshape(-1, SIZE))
    return np.concatenate(rows)


def read(targets: Targets, windows: list[list[int]]) -> list[Tensor]:
    return list(targets.batches(map(np.array, windows), pinned=False))


@pytest.mark.parametrize("block_size", [1, 16, 32, 64])
def test_each_window_has_the_records_of_its_places(
    block_size: int, several_shards: Path, open_targets: Open
) -> None:
    expected, targets = records_of(several_shards), open_targets(several_shards, block_size)
    count = len(expected) // block_size
    order = np.random.default_rng(1).permutation(count)[:128].reshape(-1, 4)
    order[0, :2] = 0, count - 1
    found = read(targets, order.tolist())
    assert len(found) == len(order)
    for windows, records in zip(order, found, strict=True):
        assert records.shape == (4, block_size, SIZE)
        for window, rows in zip(windows, records.numpy(), strict=True):
            start = window * block_size
            assert np.array_equal(rows, expected[start : start + block_size])


def test_losses_are_means_over_the_first_tokens(several_shards: Path, open_targets: Open) -> None:
    stored = np.frombuffer((several_shards / "validation.bin").read_bytes(), dtype="<f4")
    rows = dict(zip((16, 32, 64), stored.reshape(3, -1), strict=True))
    for limit in (0, 1, 100, 10**6):
        losses = open_targets(several_shards, max_tokens=limit).losses
        for context, row in rows.items():
            mean = -float(row[: limit or None].astype(np.float64).mean())
            assert losses[context] == pytest.approx(mean, rel=1e-12)


def test_it_reads_so_far_ahead_and_no_farther(
    several_shards: Path, open_targets: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BYTES_AHEAD", 10 * 4 * 32 * SIZE)
    targets, asked = open_targets(several_shards), []

    def order() -> Iterator[np.ndarray]:
        for number in range(60):
            asked.append(number)
            yield np.arange(4) + number

    batches = targets.batches(order(), pinned=False)
    next(batches)
    for number in range(1, 40):
        next(batches)
        assert len(asked) == number + 10
    assert len(list(batches)) == 20


# ── damage


def change(path: Path, place: int, *, length: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    if length is not None:
        data = data[:length]
    else:
        data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 63 * 64, CONTEXT * SIZE - 1, CONTEXT * SIZE + 3])
def test_a_window_with_one_wrong_bit_is_refused_and_others_are_read(
    place: int, targets: Path, open_targets: Open
) -> None:
    window = 41
    change(targets / "train-00001.bin", place + (CONTEXT * SIZE + 4))
    opened = open_targets(targets, 64)
    assert len(read(opened, [[40, 42, 0]])) == 1
    with pytest.raises(DataError, match="tokens 2624 to 2688 .train-00001.bin. do not have"):
        read(opened, [[40], [window]])


def test_shards_that_change_places_are_refused(targets: Path, open_targets: Open) -> None:
    """The same size and whole by themselves: the checksum is of the window's number too."""
    (targets / "train-00000.bin").rename(targets / "x")
    (targets / "train-00001.bin").rename(targets / "train-00000.bin")
    (targets / "x").rename(targets / "train-00001.bin")
    for window in (0, 40):
        with pytest.raises(DataError, match="do not have their checksum"):
            read(open_targets(targets, 64), [[window]])


def test_a_shard_of_other_targets_is_refused(
    targets: Path, several_shards: Path, open_targets: Open
) -> None:
    """Made with another seed alone, the bytes of the window being whole."""
    made = read_index(str(targets)).made
    data = bytearray((targets / "train-00000.bin").read_bytes())
    data[CONTEXT * SIZE : CONTEXT * SIZE + 4] = replace(made, seed=1).checksum(
        0, bytes(data[: CONTEXT * SIZE])
    )
    (targets / "train-00000.bin").write_bytes(data)
    with pytest.raises(DataError, match="do not have their checksum"):
        read(open_targets(targets, 64), [[0]])


def test_an_id_over_the_vocabulary_is_refused(targets: Path, open_targets: Open) -> None:
    """With the right checksum: the GPU would read what is not its own."""
    made = read_index(str(targets)).made
    data = bytearray((targets / "train-00000.bin").read_bytes())
    records = torch.frombuffer(data, dtype=torch.uint8)[: CONTEXT * SIZE].view(-1, SIZE)
    header = made.layout._front_bytes
    records[5, header : header + 2] = torch.tensor([0x00, 0x02])  # 512, the low byte first
    data[CONTEXT * SIZE : CONTEXT * SIZE + 4] = made.checksum(0, bytes(data[: CONTEXT * SIZE]))
    (targets / "train-00000.bin").write_bytes(data)
    with pytest.raises(DataError, match="hold token 512, over a vocabulary of 512"):
        read(open_targets(targets, 64), [[0]])


def test_files_that_are_missing_or_of_another_size_are_told_at_once(
    targets: Path, open_targets: Open
) -> None:
    change(targets / "train-00002.bin", 0, length=1000)
    with pytest.raises(DataError, match="train-00002.bin is damaged: it has 1000 bytes"):
        open_targets(targets)
    (targets / "train-00002.bin").unlink()
    with pytest.raises(DataError, match="train-00002.bin is missing"):
        open_targets(targets)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.5], ids=str)
def test_losses_that_are_none(value: float, targets: Path, open_targets: Open) -> None:
    change(targets / "validation.bin", 7)
    with pytest.raises(DataError, match="validation.bin is damaged"):
        open_targets(targets)
    data = bytearray((targets / "validation.bin").read_bytes())
    data[:4] = np.float32(value).tobytes()
    (targets / "validation.bin").write_bytes(data)
    with pytest.raises(DataError, match="validation.bin is damaged"):
        open_targets(targets)


def test_a_shard_that_is_replaced_or_cut_while_it_is_read(
    targets: Path, open_targets: Open
) -> None:
    opened = open_targets(targets, 64)
    read(opened, [[0]])
    path = targets / "train-00000.bin"
    shutil.copy(path, targets / "copy")
    (targets / "copy").replace(path)
    with pytest.raises(StorageError, match="is another file by now"):
        read(opened, [[1]])


# ── in a bucket


@pytest.fixture
def bucket(several_shards: Path, gcs_bucket: str) -> str:
    location = open_location(f"{gcs_bucket}/targets")
    for path in several_shards.iterdir():
        if not path.name.startswith("."):
            location.put(path, path.name)
    return location.uri


def wait_until(done: Callable[[], bool]) -> None:
    for _ in range(600):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def test_a_bucket_is_copied_once_while_its_windows_are_read(
    bucket: str, several_shards: Path, open_targets: Open, tmp_path: Path, gcs_proxy: FaultProxy
) -> None:
    expected = records_of(several_shards)
    order = np.random.default_rng(2).permutation(len(expected) // 32)[:80].reshape(-1, 4)

    def check(targets: Targets) -> None:
        for windows, records in zip(order, read(targets, order.tolist()), strict=True):
            for window, rows in zip(windows, records.numpy(), strict=True):
                assert np.array_equal(rows, expected[window * 32 : window * 32 + 32])

    other = tmp_path / "work" / f"fetched-targets-{'0' * 24}"
    own = [tmp_path / "work" / name for name in ("fetched-targets-mine", "targets-0123")]
    for directory in (other, *own):
        directory.mkdir(parents=True)
    first = open_targets(bucket)
    check(first)
    copies = tmp_path / "work" / f"fetched-targets-{first.fingerprint}"
    wait_until(lambda: len(list(copies.glob("train-*.bin"))) == 4)
    check(first)
    assert not other.exists()
    assert all(directory.exists() for directory in own)
    for path in copies.glob("train-*.bin"):
        assert path.read_bytes() == (several_shards / path.name).read_bytes()
    # Another process of the machine, and another start, find the copies
    times = {path: path.stat().st_mtime_ns for path in copies.iterdir()}
    others = [open_targets(bucket, copying=copying) for copying in (False, True)]
    location = open_location(bucket)
    for path in copies.glob("train-*.bin"):
        location.delete(path.name)
    for targets in others:
        check(targets)
    assert {path: path.stat().st_mtime_ns for path in copies.iterdir()} == times


def test_on_a_small_disk_windows_are_read_from_the_bucket(
    bucket: str,
    several_shards: Path,
    open_targets: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    expected, targets = records_of(several_shards), open_targets(bucket, 64)
    found = read(targets, [[0, 1, 130], [40, 79, 80]])
    assert np.array_equal(found[1][2].numpy(), expected[80 * 64 : 81 * 64])
    assert list((tmp_path / "work").rglob("*.bin")) == []


@pytest.mark.parametrize("what", ["damaged", "removed", "short"])
def test_a_copy_that_is_no_good_is_passed_over(
    what: str, bucket: str, several_shards: Path, open_targets: Open, tmp_path: Path
) -> None:
    expected, first = records_of(several_shards), open_targets(bucket, 64)
    copies = tmp_path / "work" / f"fetched-targets-{first.fingerprint}"
    wait_until(lambda: len(list(copies.glob("train-*.bin"))) == 4)
    path = copies / "train-00000.bin"
    if what == "removed":
        read(first, [[0]])
        path.unlink()
        targets = first
    else:
        change(path, 10, length=100 if what == "short" else None)
        targets = open_targets(bucket, 64, copying=False)
    (found,) = read(targets, [[0, 1]])
    assert np.array_equal(found.numpy().reshape(-1, SIZE), expected[:128])


def test_an_object_of_another_content_is_told_at_once(
    bucket: str, several_shards: Path, open_targets: Open
) -> None:
    location = open_location(bucket)
    location.list()
    data = bytearray((several_shards / "train-00001.bin").read_bytes())
    data[-1] ^= 1
    location.put_bytes(bytes(data), "train-00001.bin")
    with pytest.raises(DataError, match="train-00001.bin is damaged: it has .* of CRC32C"):
        open_targets(bucket)


def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give requests up soon."""
    policy = TransferPolicy(
        connect_timeout=2.0,
        read_timeout=0.5,
        first_delay=0.01,
        longest_delay=0.1,
        deadline=3.0,
        first_deadline=3.0,
    )

    def opened(uri: str) -> Location:
        return open_location(uri, policy)

    monkeypatch.setattr(reading, "open_location", opened)


def test_faults_of_the_network_change_nothing(
    bucket: str,
    several_shards: Path,
    open_targets: Open,
    monkeypatch: pytest.MonkeyPatch,
    gcs_proxy: FaultProxy,
) -> None:
    hasty(monkeypatch)
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    expected, targets = records_of(several_shards), open_targets(bucket, 64)
    order = np.random.default_rng(3).permutation(131)[:96].reshape(-1, 8)
    with gcs_proxy.injecting(Faults(seed=4, rate=0.2, only=(DOWNLOAD,))) as faults:
        found = read(targets, order.tolist())
    assert faults.counts.total() > 3
    for windows, records in zip(order, found, strict=True):
        for window, rows in zip(windows, records.numpy(), strict=True):
            assert np.array_equal(rows, expected[window * 64 : window * 64 + 64])


def test_an_object_that_goes_away_ends_the_reading_in_one_line(
    bucket: str, open_targets: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    targets = open_targets(bucket, 64)
    location = open_location(bucket)
    location.list()
    location.delete("train-00000.bin")
    with pytest.raises(StorageError, match="is gone, or is another object by now") as caught:
        read(targets, [[100], [0]])
    assert "\n" not in str(caught.value)


def test_closing_ends_the_threads(bucket: str, open_targets: Open) -> None:
    targets = open_targets(bucket, 64)
    next(targets.batches((np.array([n % 130]) for n in range(300)), pinned=False))
    targets.close()

    def gone() -> bool:
        return not any(t.name.startswith(("targets", "copies")) for t in threading.enumerate())

    wait_until(gone)
