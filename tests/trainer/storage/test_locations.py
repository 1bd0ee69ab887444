"""Locations: local directories, and Cloud Storage through the real client and a real server."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.proxy import FaultProxy
from trainer.runtime.errors import StorageError, UsageError
from trainer.storage.base import (
    Location,
    StorageConflictError,
    StorageMissingError,
    TransferPolicy,
    check_name,
)
from trainer.storage.files import atomic_write, crc32c_of_bytes, remove_abandoned
from trainer.storage.places import fetch, is_remote, open_location, read_bytes, split_uri

KIB = 1024
POLICY = TransferPolicy(
    chunk_bytes=256 * KIB,
    range_bytes=256 * KIB,
    threads=3,
    read_timeout=10,
    first_delay=0.005,
    longest_delay=0.05,
    deadline=20,
    first_deadline=20,
)
IMPATIENT = replace(POLICY, first_deadline=0.1)


@pytest.fixture(params=["local", "gs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of either kind."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('gcs_bucket')}/some/run"


def at(uri: str) -> Location:
    return open_location(uri, POLICY)


def file_of(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def reference_crc32c(data: bytes) -> str:
    """CRC-32C by its definition (RFC 3720, reversed polynomial), bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return base64.b64encode((register ^ 0xFFFFFFFF).to_bytes(4, "big")).decode()


# The same for both kinds


def test_parts_of_a_file_are_of_the_version_that_was_looked_at(uri: str) -> None:
    data = random.Random(5).randbytes(300 * KIB)
    location = at(uri)
    location.put_bytes(data, "a.bin")
    for entry in (location.stat("a.bin"), location.list()[0]):
        for start, size in ((0, 1), (0, len(data)), (123, 70_000), (len(data) - 1, 1)):
            assert location.read_range(entry, start, size) == data[start : start + size]
    location.put_bytes(data, "a.bin")
    assert location.read_range(location.stat("a.bin"), 1, 2) == data[1:3]
    with pytest.raises(StorageMissingError, match="is another|is gone"):
        location.read_range(entry, 0, 1)
    entry = location.stat("a.bin")
    location.delete("a.bin")
    with pytest.raises(StorageMissingError):
        location.read_range(entry, 0, 1)


@pytest.mark.parametrize(
    "size", [0, 1, 256 * KIB - 1, 256 * KIB, 256 * KIB + 1, 512 * KIB, 1_000_003]
)
def test_what_is_put_comes_back(uri: str, size: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    place = at(uri)
    entry = place.put(file_of(tmp_path / "source", data), "weights.pt")
    assert (entry.name, entry.size) == ("weights.pt", size)
    assert entry.crc32c == crc32c_of_bytes(data)
    copy = tmp_path / "deep" / "copy.pt"
    got = at(uri).get("weights.pt", copy)
    assert copy.read_bytes() == data
    assert (got.size, got.crc32c, got.generation) == (size, entry.crc32c, entry.generation)
    assert at(uri).read_bytes("weights.pt", limit=size) == data
    assert [path.name for path in copy.parent.iterdir()] == ["copy.pt"]


def test_the_checksum_is_crc32c() -> None:
    # The check value of the CRC-32C parameters, and random bytes by the definition
    assert reference_crc32c(b"123456789") == base64.b64encode(bytes.fromhex("e3069283")).decode()
    data = random.Random(1).randbytes(1000)
    assert crc32c_of_bytes(data) == reference_crc32c(data)


def test_a_listing_has_the_files_directly_below(uri: str) -> None:
    place = at(uri)
    assert place.list() == []
    for name in ("b.pt", "a.pt", "a.pt.meta.json"):
        place.put_bytes(name.encode(), name)
    at(f"{uri}/deeper").put_bytes(b"x", "c.pt")
    at(f"{uri}-beside").put_bytes(b"x", "d.pt")
    found = at(uri).list()
    assert [(entry.name, entry.size) for entry in found] == [
        ("a.pt", 4),
        ("a.pt.meta.json", 14),
        ("b.pt", 4),
    ]
    assert [entry.generation for entry in found] == [
        place.stat(entry.name).generation for entry in found
    ]
    assert place.child("a.pt") == f"{place.uri}/a.pt"
    assert split_uri(place.child("a.pt")) == (place.uri, "a.pt")


def test_an_own_file_can_be_replaced_and_removed(uri: str) -> None:
    place = at(uri)
    first = place.put_bytes(b"1", "best.pt")
    second = place.put_bytes(b"22", "best.pt")
    assert second.generation != first.generation
    place.delete("best.pt")
    place.delete("best.pt")
    with pytest.raises(StorageMissingError, match="best.pt"):
        place.stat("best.pt")
    place.put_bytes(b"333", "best.pt")
    assert at(uri).read_bytes("best.pt", limit=3) == b"333"


def test_what_was_there_at_the_start_can_be_replaced(uri: str) -> None:
    at(uri).put_bytes(b"of the run before", "best.pt")
    place = at(uri)
    place.list()
    place.put_bytes(b"mine", "best.pt")
    single = at(uri)
    single.stat("best.pt")
    single.put_bytes(b"mine too", "best.pt")
    assert read_bytes(f"{uri}/best.pt", limit=10) == b"mine too"


@pytest.mark.parametrize("size", [10, 600_000])
def test_the_second_of_two_jobs_is_refused(
    uri: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = at(uri), at(uri)
    assert first.list() == second.list() == []
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "4711")
    first.put(file_of(tmp_path / "source", b"a" * size), "best.pt")
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "4712")
    theirs = file_of(tmp_path / "theirs", b"b" * size)
    writer = f"host {socket.gethostname()}, process {os.getpid()}, job 4711"
    with pytest.raises(StorageConflictError, match=writer) as caught:
        second.put(theirs, "best.pt")
    assert "\n" not in str(caught.value)
    assert "4712" in str(caught.value)
    with pytest.raises(StorageConflictError):
        second.delete("best.pt")
    # To have seen it in a later listing is no license
    second.list()
    second.stat("best.pt")
    with pytest.raises(StorageConflictError):
        second.put(theirs, "best.pt")
    assert at(uri).read_bytes("best.pt", limit=size) == b"a" * size
    first.put_bytes(b"c", "best.pt")


def test_a_job_whose_file_was_replaced_is_refused(uri: str) -> None:
    first = at(uri)
    first.put_bytes(b"1", "best.pt")
    second = at(uri)
    second.list()
    second.put_bytes(b"2", "best.pt")
    with pytest.raises(StorageConflictError):
        first.put_bytes(b"3", "best.pt")
    assert at(uri).read_bytes("best.pt", limit=1) == b"2"


def test_the_first_to_claim_goes_on(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = at(uri), at(uri)
    assert first.list() == second.list() == []
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "4711")
    first.claim()
    monkeypatch.setenv("CLOUD_ML_JOB_ID", "4712")
    for _ in range(2):
        with pytest.raises(StorageConflictError, match="job 4711") as caught:
            second.claim()
        assert "\n" not in str(caught.value)
        monkeypatch.setenv("CLOUD_ML_JOB_ID", "4711")
        first.claim()
        monkeypatch.setenv("CLOUD_ML_JOB_ID", "4712")
    assert at(uri).list() == []


def test_a_later_job_takes_over_what_the_former_was_writing_and_nothing_else(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(number: str) -> None:
        monkeypatch.setenv("CLOUD_ML_JOB_ID", number)

    first, second, stranger = at(uri), at(uri), at(uri)
    job("first")
    first.list(), stranger.list()
    first.claim()
    second.list()
    first.put_bytes(b"1", "best.pt")
    job("stranger")
    stranger.put_bytes(b"s", "final.pt")
    job("second")
    with pytest.raises(StorageConflictError):
        second.put_bytes(b"2", "best.pt")  # before it has claimed
    second.claim()
    second.put_bytes(b"2", "best.pt")
    with pytest.raises(StorageConflictError, match="job stranger"):
        second.put_bytes(b"2", "final.pt")
    job("first")
    with pytest.raises(StorageConflictError, match="job second"):
        first.put_bytes(b"1", "best.pt")
    with pytest.raises(StorageConflictError, match="job second"):
        first.claim()
    job("second")
    second.claim()
    second.delete("best.pt")
    assert [entry.name for entry in at(uri).list()] == ["final.pt"]


def test_a_job_that_has_claimed_again_is_not_taken_over(uri: str) -> None:
    first, second = at(uri), at(uri)
    first.claim()
    second.list()
    first.claim()
    with pytest.raises(StorageConflictError):
        second.claim()


def test_a_file_that_somebody_removed_is_written_again(uri: str) -> None:
    place = at(uri)
    place.put_bytes(b"1", "best.pt")
    other = at(uri)
    other.list()
    other.delete("best.pt")
    place.put_bytes(b"2", "best.pt")
    assert at(uri).read_bytes("best.pt", limit=1) == b"2"


def test_more_than_the_limit_is_not_read(uri: str) -> None:
    at(uri).put_bytes(b"x" * 11, "sidecar.json")
    with pytest.raises(StorageError, match=r"sidecar.json has 11 bytes; at most 10"):
        at(uri).read_bytes("sidecar.json", limit=10)


def test_a_missing_file_is_named(uri: str, tmp_path: Path) -> None:
    for read in (
        lambda: at(uri).stat("no.pt"),
        lambda: at(uri).get("no.pt", tmp_path / "no.pt"),
        lambda: at(uri).read_bytes("no.pt", limit=1),
        lambda: fetch(f"{uri}/no.pt", tmp_path),
    ):
        with pytest.raises(StorageMissingError, match=r"no\.pt.* does not exist"):
            read()
    assert not (tmp_path / "no.pt").exists()


def test_fetch_gives_a_local_path(uri: str, tmp_path: Path) -> None:
    at(uri).put_bytes(b"weights", "w.pt")
    target = tmp_path / "work"
    target.mkdir()
    path, crc32c = fetch(f"{uri}/w.pt", target)
    assert path.read_bytes() == b"weights"
    assert path == (target / "w.pt" if is_remote(uri) else Path(uri) / "w.pt")
    assert crc32c == (crc32c_of_bytes(b"weights") if is_remote(uri) else None)


def test_a_writable_place_is_left_as_it_was(uri: str) -> None:
    at(uri).check_writable()
    at(uri).put_bytes(b"x", "x")
    at(uri).check_writable()
    assert [entry.name for entry in at(uri).list()] == ["x"]


def test_the_probe_of_a_bucket_is_removed(gcs_bucket: str) -> None:
    from google.cloud import storage

    at(f"{gcs_bucket}/run").check_writable()
    assert list(storage.Client().list_blobs(gcs_bucket.removeprefix("gs://"))) == []


BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\nb", "a\0b", ".hid", "ä" * 101]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused(uri: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be the name"):
        check_name(name)
    for use in (
        lambda: at(uri).put_bytes(b"", name),
        lambda: at(uri).get(name, tmp_path / "x"),
        lambda: at(uri).stat(name),
        lambda: at(uri).delete(name),
        lambda: at(uri).read_bytes(name, limit=1),
    ):
        with pytest.raises(StorageError, match="cannot be the name"):
            use()


# Moved into place, and copied


def test_an_adopted_file_is_whole_and_only_this_jobs(uri: str, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(600_000)
    place, other = at(uri), at(uri)
    other.list()
    made = file_of(tmp_path / "made", data)
    entry = place.adopt(made, "w.pt", crc32c_of_bytes(data))
    assert (entry.size, entry.crc32c) == (600_000, crc32c_of_bytes(data))
    assert at(uri).stat("w.pt").generation == entry.generation
    assert at(uri).read_bytes("w.pt", limit=600_000) == data
    with pytest.raises(StorageConflictError):
        other.adopt(file_of(tmp_path / "theirs", b"x"), "w.pt", crc32c_of_bytes(b"x"))
    assert at(uri).read_bytes("w.pt", limit=600_000) == data
    place.adopt(file_of(tmp_path / "again", b"y"), "w.pt", crc32c_of_bytes(b"y"))
    assert at(uri).read_bytes("w.pt", limit=9) == b"y"


def test_a_copy_has_the_content_and_outlives_its_original(uri: str, tmp_path: Path) -> None:
    data = random.Random(4).randbytes(600_000)
    place = at(uri)
    place.put_bytes(b"before", "best.pt")
    original = place.put(file_of(tmp_path / "source", data), "ckpt_step_1.pt")
    for name in ("best.pt", "final.pt", "best.pt"):
        entry = place.copy(original, name)
        assert (entry.name, entry.size, entry.crc32c) == (name, 600_000, original.crc32c)
        assert at(uri).stat(name).generation == entry.generation
    place.put_bytes(b"other", "final.pt")
    place.delete("ckpt_step_1.pt")
    assert at(uri).read_bytes("best.pt", limit=600_000) == data
    assert at(uri).read_bytes("final.pt", limit=5) == b"other"
    assert [entry.name for entry in at(uri).list()] == ["best.pt", "final.pt"]


def test_a_copy_replaces_nothing_of_another_job(uri: str) -> None:
    place, other = at(uri), at(uri)
    place.list(), other.list()
    original = place.put_bytes(b"mine", "ckpt_step_1.pt")
    other.put_bytes(b"theirs", "best.pt")
    with pytest.raises(StorageConflictError, match=r"best\.pt was written by another job"):
        place.copy(original, "best.pt")
    assert at(uri).read_bytes("best.pt", limit=9) == b"theirs"


@pytest.mark.parametrize("changed", ["removed", "replaced"])
def test_only_what_was_written_is_copied(uri: str, changed: str) -> None:
    place, other = at(uri), at(uri)
    original = place.put_bytes(b"mine", "ckpt_step_1.pt")
    other.list()
    if changed == "removed":
        other.delete("ckpt_step_1.pt")
    else:
        other.put_bytes(b"theirs", "ckpt_step_1.pt")
    with pytest.raises(StorageMissingError, match=r"ckpt_step_1\.pt"):
        place.copy(original, "best.pt")
    with pytest.raises(StorageMissingError):
        at(uri).stat("best.pt")


def test_a_copy_on_the_server_sends_no_content(
    gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    place = at(gcs_bucket)
    original = place.put(file_of(tmp_path / "source", b"x" * 600_000), "ckpt_step_1.pt")
    gcs_proxy.requests.clear()
    gcs_proxy.copies_in_parts = True
    place.copy(original, "best.pt")
    assert ["rewriteTo" in path for _, path in gcs_proxy.requests] == [True, True]
    assert all(f"ifSourceGenerationMatch={original.generation}" in p for _, p in gcs_proxy.requests)
    assert all("ifGenerationMatch=0" in path for _, path in gcs_proxy.requests)


def test_a_copy_of_other_content_is_not_vouched_for(gcs_bucket: str, gcs_proxy: FaultProxy) -> None:
    place = at(gcs_bucket)
    original = place.put_bytes(b"x" * 1000, "ckpt_step_1.pt")
    with pytest.raises(StorageError, match=r"best\.pt arrived damaged 3 times"):
        place.copy(replace(original, crc32c="AAAAAA=="), "best.pt")
    assert [entry.name for entry in at(gcs_bucket).list()] == ["ckpt_step_1.pt"]


@pytest.mark.parametrize("links", [True, False])
def test_a_local_copy_shares_its_content_where_the_file_system_can(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    place = at(str(tmp_path))
    original = place.put_bytes(b"x" * 1000, "ckpt_step_1.pt")
    entry = place.copy(original, "best.pt")
    assert (tmp_path / "best.pt").read_bytes() == b"x" * 1000
    assert entry == replace(at(str(tmp_path)).stat("best.pt"), crc32c=original.crc32c)
    inodes = {(tmp_path / name).stat().st_ino for name in ("ckpt_step_1.pt", "best.pt")}
    assert len(inodes) == (1 if links else 2)
    assert sorted(os.listdir(tmp_path)) == [".writers.json", "best.pt", "ckpt_step_1.pt"]
    if not links:
        with pytest.raises(StorageError, match="has changed since it was written"):
            place.copy(replace(original, crc32c="AAAAAA=="), "final.pt")
        assert not (tmp_path / "final.pt").exists()


def test_a_file_of_another_file_system_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.replace

    def across(source: str | Path, target: Path) -> None:
        if Path(source).parent != target.parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(os, "replace", across)
    made = file_of(tmp_path / "made", b"content")
    place = at(str(tmp_path / "place"))
    entry = place.adopt(made, "w.pt", crc32c_of_bytes(b"content"))
    assert (tmp_path / "place" / "w.pt").read_bytes() == b"content"
    assert place.stat("w.pt").generation == entry.generation


# URIs


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("", "neither gs:// nor"),
        ("s3://bucket/x", "neither gs:// nor"),
        ("https://storage.googleapis.com/b/x", "neither gs:// nor"),
        ("gs://", "not the name of a bucket"),
        ("gs://UPPER/x", "'UPPER' is not the name of a bucket"),
        ("gs://bucket//x", "no empty"),
        ("gs://bucket/../x", "no empty"),
    ],
)
def test_bad_uris_are_refused(uri: str, line: str) -> None:
    with pytest.raises(UsageError, match=line.replace("gs:// nor", "gs://bucket/path nor")):
        open_location(uri)


@pytest.mark.parametrize("uri", ["gs://bucket", "gs://bucket/", "gs://bucket/run/", "dir/", ""])
def test_a_file_needs_a_name(uri: str) -> None:
    with pytest.raises(UsageError):
        split_uri(uri)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("gs://bucket/x.pt", ("gs://bucket", "x.pt")),
        ("gs://bucket/a/b/x.pt", ("gs://bucket/a/b", "x.pt")),
        ("/x.pt", ("/", "x.pt")),
        ("x.pt", (".", "x.pt")),
        ("a/x.pt", ("a", "x.pt")),
    ],
)
def test_uris_are_split(uri: str, parts: tuple[str, str]) -> None:
    assert split_uri(uri) == parts


def test_chunks_must_suit_cloud_storage() -> None:
    with pytest.raises(UsageError, match="chunk_bytes=1000"):
        TransferPolicy(chunk_bytes=1000)


# Cloud Storage


def test_hostile_object_names_stay_out_of_a_listing(
    gcs_bucket: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from google.cloud import storage

    bucket = storage.Client().bucket(gcs_bucket.removeprefix("gs://"))
    for name in (
        "..",
        "../../etc/cron.d/x",
        "run/..",
        "run/../x",
        "run/a\\..\\b",
        "run/a\rb",
        "run/ok",
    ):
        bucket.blob(name).upload_from_string(b"hostile")
    caplog.set_level("WARNING", "trainer")
    assert [entry.name for entry in at(f"{gcs_bucket}/run").list()] == ["ok"]
    assert at(gcs_bucket).list() == []
    assert "'a\\\\..\\\\b'" in caplog.text
    with pytest.raises(StorageError):
        fetch(f"{gcs_bucket}/run/..", tmp_path)


def test_a_large_object_travels_in_ranges_of_one_generation(
    gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(1_000_000)
    entry = at(gcs_bucket).put(file_of(tmp_path / "source", data), "w.pt")
    gcs_proxy.requests.clear()
    at(gcs_bucket).get("w.pt", tmp_path / "copy")
    downloads = [path for _, path in gcs_proxy.requests if "alt=media" in path]
    assert len(downloads) == 4
    assert all(f"generation={entry.generation}" in path for path in downloads)


def test_an_object_replaced_while_it_is_read_is_read_anew(
    gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    place, reader = at(gcs_bucket), at(gcs_bucket)
    place.put_bytes(b"old" * 1000, "w.pt")
    asked = gcs_proxy.ask
    replaced = False

    def ask(method: str, path: str, body: bytes, headers: dict[str, str]):  # type: ignore[no-untyped-def]
        nonlocal replaced
        if "alt=media" in path and not replaced:
            replaced = True
            place.put_bytes(b"newer" * 1000, "w.pt")
        return asked(method, path, body, headers)

    gcs_proxy.ask = ask  # type: ignore[method-assign]
    reader.get("w.pt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"newer" * 1000


def test_an_object_replaced_just_before_its_removal_stays(
    gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    place = at(gcs_bucket)
    place.put_bytes(b"mine", "w.pt")
    look = gcs_proxy.generation

    def generation(bucket: str, name: str) -> str:
        # Asked by the proxy when the removal has arrived, before it takes place
        gcs_proxy.generation = look  # type: ignore[method-assign]
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}"
        assert gcs_proxy.ask("POST", path, b"theirs", {})[0] == 200
        return look(bucket, name)

    gcs_proxy.generation = generation  # type: ignore[method-assign]
    with pytest.raises(StorageConflictError, match="a program that left no name"):
        place.delete("w.pt")
    assert at(gcs_bucket).read_bytes("w.pt", limit=10) == b"theirs"


def test_bytes_damaged_on_the_way_are_noticed(
    gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    at(gcs_bucket).put(file_of(tmp_path / "source", b"x" * 600_000), "w.pt")
    asked, damages = gcs_proxy.ask, 1

    def ask(method: str, path: str, body: bytes, headers: dict[str, str]):  # type: ignore[no-untyped-def]
        nonlocal damages
        status, answer_headers, answer = asked(method, path, body, headers)
        if "alt=media" in path and damages > 0:
            damages -= 1
            answer = answer[:-1] + b"y"
        return status, answer_headers, answer

    gcs_proxy.ask = ask  # type: ignore[method-assign]
    copy = tmp_path / "copy"
    at(gcs_bucket).get("w.pt", copy)
    assert copy.read_bytes() == b"x" * 600_000
    copy.unlink()
    damages = 10**6
    with pytest.raises(StorageError, match="arrived damaged 3 times"):
        at(gcs_bucket).get("w.pt", copy)
    with pytest.raises(StorageError, match="arrived damaged 3 times"):
        at(gcs_bucket).read_bytes("w.pt", limit=10**6)
    assert list(tmp_path.glob("*copy*")) == []


def test_a_file_changed_during_its_upload_is_not_vouched_for(
    gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    source = file_of(tmp_path / "source", b"x" * 600_000)
    asked = gcs_proxy.ask

    def ask(method: str, path: str, body: bytes, headers: dict[str, str]):  # type: ignore[no-untyped-def]
        if "upload_id" in path:
            with open(source, "r+b") as file:
                file.seek(300_000)
                file.write(random.randbytes(4))
        return asked(method, path, body, headers)

    gcs_proxy.ask = ask  # type: ignore[method-assign]
    with pytest.raises(StorageError, match=r"w\.pt"):
        at(gcs_bucket).put(source, "w.pt")
    gcs_proxy.ask = asked  # type: ignore[method-assign]
    assert at(gcs_bucket).list() == []


@pytest.mark.parametrize("size", [1_000, 600_000])
def test_an_upload_that_the_server_finds_damaged_is_sent_again(
    size: int, gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    """Cloud Storage compares the checksums itself; the fake does not."""
    data = random.Random(2).randbytes(size)
    source = file_of(tmp_path / "source", data)
    asked, damages = gcs_proxy.ask, 2
    message = 'Provided CRC32C "AAAAAA==" doesn\'t match calculated CRC32C "n03x6A==".'
    refusal = json.dumps({"error": {"code": 400, "message": message}}).encode()

    def ask(method: str, path: str, body: bytes, headers: dict[str, str]):  # type: ignore[no-untyped-def]
        nonlocal damages
        if "upload_id" in path or "uploadType=multipart" in path:
            damages -= 1
            if damages >= 0:
                return 400, {"Content-Type": "application/json"}, refusal
        return asked(method, path, body, headers)

    gcs_proxy.ask = ask  # type: ignore[method-assign]
    assert at(gcs_bucket).put(source, "w.pt").size == size
    assert at(gcs_bucket).read_bytes("w.pt", limit=size) == data
    damages = 10**6
    with pytest.raises(StorageError, match=r"other\.pt arrived damaged 3 times") as caught:
        at(gcs_bucket).put(source, "other.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (403, "permission denied .*robot does not have storage.objects"),
        (401, "credentials are not accepted"),
        (400, "HTTP 400: robot"),
    ],
)
def test_a_refusal_is_one_line(
    status: int, line: str, gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    gcs_proxy.refusal = (status, "robot does not have storage.objects.create access")
    source = file_of(tmp_path / "source", b"x" * 300_000)
    for use in (
        lambda: at(gcs_bucket).list(),
        lambda: at(gcs_bucket).check_writable(),
        lambda: at(gcs_bucket).put(source, "w.pt"),
        lambda: at(gcs_bucket).put_bytes(b"x", "w.pt"),
        lambda: at(gcs_bucket).get("w.pt", tmp_path / "copy"),
        lambda: at(gcs_bucket).delete("w.pt"),
    ):
        with pytest.raises(StorageError, match=line) as caught:
            use()
        assert gcs_bucket in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("right", ["create", "delete"])
def test_each_right_to_write_is_tried_at_the_start(
    right: str, gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    """To replace an object is to delete the one before; Storage Object Creator may not."""
    asked = gcs_proxy.ask
    message = f"robot does not have storage.objects.{right} access"
    refusal = json.dumps({"error": {"code": 403, "message": message}}).encode()

    def ask(method: str, path: str, body: bytes, headers: dict[str, str]):  # type: ignore[no-untyped-def]
        replacing = "ifGenerationMatch=" in path and "ifGenerationMatch=0" not in path
        used = "delete" if replacing else "create"
        if method in ("POST", "DELETE") and used == right:
            return 403, {"Content-Type": "application/json"}, refusal
        return asked(method, path, body, headers)

    gcs_proxy.ask = ask  # type: ignore[method-assign]
    with pytest.raises(
        StorageError, match=f"objects.{right} access.*Storage Object User"
    ) as caught:
        at(f"{gcs_bucket}/run").check_writable()
    assert f"{gcs_bucket}/run" in str(caught.value)
    assert at(f"{gcs_bucket}/run").list() == []


def test_a_missing_bucket_is_named(gcs_bucket: str, gcs_proxy: FaultProxy, tmp_path: Path) -> None:
    source = file_of(tmp_path / "source", b"x" * 300_000)
    place = at("gs://no-such-bucket/run")
    for use in (
        place.list,
        place.check_writable,
        lambda: place.put(source, "w.pt"),
        lambda: place.put_bytes(b"x", "w.pt"),
    ):
        with pytest.raises(StorageMissingError, match="bucket gs://no-such-bucket does not exist"):
            use()
    # The fake says the same of a missing object and of one in a missing bucket; Google does not
    gcs_proxy.refusal = (404, "The specified bucket does not exist.")
    with pytest.raises(StorageMissingError, match="bucket gs://no-such-bucket does not exist"):
        place.get("w.pt", tmp_path / "copy")
    gcs_proxy.refusal = (404, "No such object: no-such-bucket/run/w.pt")
    with pytest.raises(StorageMissingError, match=r"run/w\.pt does not exist"):
        place.get("w.pt", tmp_path / "copy")


def test_a_server_that_stays_away_is_given_up(
    gcs_bucket: str, gcs_proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    gcs_proxy.refusal = (503, "try later")
    with pytest.raises(StorageError, match="given up after repeated tries: HTTP 503: try later"):
        open_location(gcs_bucket, IMPATIENT).list()
    assert "trying again" in caplog.text


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        with pytest.raises(StorageError, match=rf"no answer from 127.0.0.1:{port}: .*refused"):
            open_location("gs://bucket/run", IMPATIENT).list()


def test_no_credentials_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(StorageError, match="gs://bucket/run.*there are no Google credentials"):
        open_location("gs://bucket/run", IMPATIENT).list()
    with pytest.raises(StorageError, match="there are no Google credentials"):
        open_location("gs://bucket/run", IMPATIENT).put_bytes(b"x", "x")


def test_a_missing_client_library_is_one_line() -> None:
    program = """
        import sys
        sys.modules["google.cloud.storage"] = None
        sys.modules["google.cloud"] = None
        from trainer.runtime.errors import UsageError
        from trainer.storage.places import open_location
        open_location("/tmp")
        try:
            open_location("gs://bucket/run")
        except UsageError as error:
            print(error)
        """
    assert "pip install 'liquid-annealing[cloud]'" in python(program).stdout


# Local directories


def python(
    program: str, *arguments: str, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def test_atomic_write_keeps_the_old_file_until_the_end(tmp_path: Path) -> None:
    path = file_of(tmp_path / "best.pt", b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"%d" % (1 // 0))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["best.pt"]


def test_atomic_write_respects_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "x") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


FILLING = """
    import sys, torch
    from pathlib import Path
    from trainer.runtime.errors import StorageError
    from trainer.storage.files import atomic_write
    from trainer.storage.places import open_location
    root = Path(sys.argv[1])
    (root.parent / "source").write_bytes(bytes(3_000_000))
    def save():
        with atomic_write(root / "best.pt") as file:
            torch.save({"weights": torch.zeros(700_000)}, file)
    for attempt in (
        save,
        lambda: open_location(str(root)).put(root.parent / "source", "best.pt"),
        lambda: open_location(str(root)).put_bytes(bytes(3_000_000), "best.pt"),
        lambda: open_location(str(root)).check_writable(),
    ):
        try:
            attempt()
        except StorageError as error:
            print(error)
    print(sorted(path.name for path in root.iterdir()))
    """

needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode != 0,
    reason="needs user namespaces to mount a small disk",
)


def mounted(script: str) -> tuple[str, ...]:
    """A command that runs another one after mounting something only for it."""
    return ("unshare", "-Urm", "sh", "-c", f'{script} && exec "$@"', "sh")


@needs_namespaces
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    before = mounted(f"mount -t tmpfs -o size=1m none {root}")
    lines = python(FILLING, str(root), before=before).stdout.splitlines()
    assert len(lines) == 4  # the probe is small and fits
    for line in lines[:3]:
        assert str(root) in line
        assert "the disk is full (1 MiB free)" in line
    assert lines[3] in ("[]", "['.writers.json']")


@needs_namespaces
def test_a_read_only_directory_is_one_line(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    (root / "old.pt").write_bytes(b"old")
    before = mounted(f"mount --bind {root} {root} && mount -o remount,ro,bind {root}")
    lines = python(FILLING, str(root), before=before).stdout.splitlines()
    assert len(lines) == 5
    for line in lines[:4]:
        assert str(root) in line
        assert "read-only" in line
    assert lines[4] == "['old.pt']"


@needs_namespaces
def test_reading_needs_no_write_permission(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(b"old")
    program = """
        import sys
        from trainer.storage.places import open_location
        place = open_location(sys.argv[1])
        print([entry.name for entry in place.list()], place.read_bytes("old.pt", limit=9))
        """
    before = mounted(f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}")
    assert python(program, str(tmp_path), before=before).stdout == "['old.pt'] b'old'\n"


def test_a_file_in_place_of_the_directory_is_one_line(tmp_path: Path) -> None:
    place = at(str(file_of(tmp_path / "file", b"")))
    for use in (place.list, place.check_writable, lambda: place.put_bytes(b"", "x")):
        with pytest.raises(StorageError, match="failed: "):
            use()


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "dir.pt").mkdir()
    with pytest.raises(StorageError, match="it is a directory"):
        fetch(str(tmp_path / "dir.pt"), tmp_path)
    assert at(str(tmp_path)).list() == []


def test_a_killed_writer_leaves_no_file_and_is_cleaned_up_after(tmp_path: Path) -> None:
    program = """
        import sys, time
        from trainer.storage.files import atomic_write
        with atomic_write(sys.argv[1]) as file:
            file.write(b"half")
            file.flush()
            print("writing", flush=True)
            time.sleep(60)
        """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "best.pt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        (left,) = tmp_path.iterdir()
        old = time.time() - 3600
        os.utime(left, (old, old))
        remove_abandoned(tmp_path)
        assert left.exists(), "its writer is alive"
        writer.send_signal(signal.SIGKILL)
    assert at(str(tmp_path)).list() == []
    remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_young_unlocked_temporary_file_is_left(tmp_path: Path) -> None:
    young = file_of(tmp_path / ".best.pt.12-0123abcd.tmp", b"")
    other = file_of(tmp_path / ".notes.tmp", b"")
    os.utime(other, (0, 0))
    at(str(tmp_path)).check_writable()
    assert young.exists()
    assert other.exists()


def test_a_rename_may_change_inode_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on mounts of object stores, where it is a copy."""
    rename = os.replace

    def copying(source: str, target: Path) -> None:
        rename(shutil.copy(source, f"{source}.copy"), target)
        os.utime(target, ns=(0, 1_700_000_000_123_456_789))
        os.unlink(source)

    monkeypatch.setattr(os, "replace", copying)
    place = at(str(tmp_path))
    for data in (b"1", b"22", b"333"):
        entry = place.put_bytes(data, "best.pt")
        assert entry == replace(at(str(tmp_path)).stat("best.pt"), crc32c=entry.crc32c)
    place.delete("best.pt")


def test_a_broken_list_of_writers_costs_only_the_name(tmp_path: Path) -> None:
    first, second = at(str(tmp_path)), at(str(tmp_path))
    first.list(), second.list()
    first.put_bytes(b"1", "best.pt")
    for broken in (b"{", b"[1]", b"\xff", b"[" * 200_000):
        (tmp_path / ".writers.json").write_bytes(broken)
        with pytest.raises(StorageConflictError, match="left no name"):
            second.put_bytes(b"2", "best.pt")
    first.put_bytes(b"3", "best.pt")
    assert list(json.loads((tmp_path / ".writers.json").read_text())) == ["best.pt"]


def test_a_list_of_writers_behind_a_link_is_not_written_to(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".writers.json").symlink_to(victim)
    with pytest.raises(StorageError, match=os.strerror(errno.ELOOP)):
        at(str(tmp_path / "run")).put_bytes(b"1", "best.pt")
    assert victim.read_bytes() == b"{}"


def test_an_error_without_a_rule_keeps_its_own_words(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(StorageError, match=os.strerror(errno.ELOOP)):
        at(str(loop)).list()
