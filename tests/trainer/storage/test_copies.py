"""Directories of Cloud Storage as copies on this machine, by the real client."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from google.cloud import storage

from tests.faults.proxy import DOWNLOAD, FaultProxy, Faults
from trainer.runtime.errors import StorageError
from trainer.storage.copies import Listing, check_revision, list_files, local_copy
from trainer.storage.places import open_location
from trainer.storage.scratch import remove_abandoned_scratch

DATA = random.Random(3).randbytes(20_000_000)
"""Three ranges."""

COPY = """
import sys
import time
from trainer.runtime.log import set_up_logging
from trainer.storage.copies import list_files, local_copy
set_up_logging()
print(local_copy(list_files(sys.argv[1], bool, most=9), sys.argv[2]))
"""


def upload(uri: str, files: dict[str, bytes]) -> None:
    name, _, prefix = uri.removeprefix("gs://").partition("/")
    bucket = storage.Client().bucket(name)
    for path, data in files.items():
        bucket.blob(f"{prefix}/{path}".lstrip("/")).upload_from_string(data)


def everything(uri: str) -> Listing:
    return list_files(uri, bool, most=100)


def held(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def downloads(proxy: FaultProxy) -> list[str]:
    return [path for _, path in proxy.requests if "alt=media" in path]


@pytest.fixture
def place(gcs_bucket: str) -> str:
    return f"{gcs_bucket}/some/files"


def test_a_copy_has_every_file_and_is_made_once(
    place: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    files = {"a.json": b"{}", "deep/er/b.txt": b"text", "empty.txt": b"", "large.bin": DATA}
    upload(place, files)
    directory = local_copy(everything(place), str(tmp_path))
    assert held(directory) == files
    gcs_proxy.requests.clear()
    assert local_copy(everything(place), str(tmp_path)) == directory
    assert downloads(gcs_proxy) == []


def test_only_what_is_needed_counts_and_is_fetched(
    place: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    upload(place, {"a.json": b"{}", "b.h5": b"large", "c/d.json": b"[]", "c/": b""})
    before = list_files(place, lambda name: name.endswith(".json"), most=9)
    upload(place, {"b.h5": b"larger"})
    assert list_files(place, lambda name: name.endswith(".json"), most=9).digest == before.digest
    assert held(local_copy(before, str(tmp_path))) == {"a.json": b"{}", "c/d.json": b"[]"}
    assert not any("b.h5" in path for path in downloads(gcs_proxy))


def test_a_changed_directory_is_another_copy(place: str, tmp_path: Path) -> None:
    upload(place, {"a.txt": b"one"})
    before = everything(place)
    first = local_copy(before, str(tmp_path))
    upload(place, {"a.txt": b"two"})
    after = everything(place)
    assert before.digest != after.digest
    assert held(local_copy(after, str(tmp_path))) == {"a.txt": b"two"}
    assert held(first) == {"a.txt": b"one"}
    check_revision(after, place, after.digest, "teacher_revision")
    with pytest.raises(StorageError, match=f"was changed: .* {after.digest}, not {before.digest}"):
        check_revision(after, place, before.digest, "teacher_revision")


def test_a_single_object_and_nothing_at_all(gcs_bucket: str, tmp_path: Path) -> None:
    upload(gcs_bucket, {"texts/a.txt": b"one"})
    listing = everything(f"{gcs_bucket}/texts/a.txt")
    assert listing.names == {"a.txt"}
    assert held(local_copy(listing, str(tmp_path))) == {"a.txt": b"one"}
    for nothing in (f"{gcs_bucket}/text", f"{gcs_bucket}/texts/b.txt"):
        with pytest.raises(StorageError, match=f"there is no object at {nothing}, and none below"):
            everything(nothing)
    with pytest.raises(StorageError, match="bucket gs://no-such-bucket does not exist"):
        everything("gs://no-such-bucket/texts")


def test_too_many_files_are_one_line(place: str) -> None:
    upload(place, {f"{number}.txt": b"" for number in range(12)})
    with pytest.raises(StorageError, match="has more than 11 files; give the directory of"):
        list_files(place, bool, most=11)
    assert len(list_files(place, bool, most=12).entries) == 12


def test_names_that_lead_elsewhere_are_left_out(
    gcs_bucket: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    hostile = ("d/../../x.txt", "d/a\\b.txt", "d/a/../b.txt", "d/sub//x.txt")
    upload(gcs_bucket, dict.fromkeys((*hostile, "d/ok.txt", "d/.hidden/x.txt"), b"hostile"))
    caplog.set_level("WARNING", "trainer")
    assert everything(f"{gcs_bucket}/d").names == {"ok.txt"}
    assert "'a/../b.txt' is ignored" in caplog.text
    assert ".hidden" not in caplog.text
    local_copy(everything(f"{gcs_bucket}/d"), str(tmp_path / "cache"))
    assert not list(tmp_path.rglob("x.txt"))


def test_an_object_that_changes_meanwhile_is_one_line(place: str, tmp_path: Path) -> None:
    upload(place, {"a.txt": b"one", "b.txt": b"one"})
    listing = everything(place)
    upload(place, {"b.txt": b"two"})
    with pytest.raises(StorageError, match=r"b\.txt was changed while it was being fetched; start"):
        local_copy(listing, str(tmp_path))
    assert not [path for path in (tmp_path / "copies").iterdir() if path.is_dir()]


def test_faults_of_the_connection_are_passed_over(
    place: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    upload(place, {"large.bin": DATA})
    kinds = ("503", "truncated download", "short download")
    with gcs_proxy.injecting(Faults(1, 1.0, kinds=kinds, only=(DOWNLOAD,), limit=3)) as faults:
        directory = local_copy(everything(place), str(tmp_path))
    assert sum(faults.counts.values()) == 3
    assert held(directory) == {"large.bin": DATA}


def test_what_arrives_damaged_is_refused(place: str, tmp_path: Path) -> None:
    upload(place, {"a.txt": b"one"})
    listing = everything(place)
    (entry,) = listing.entries
    other = Listing(listing.uri, (replace(entry, crc32c="AAAAAA=="),))
    with pytest.raises(StorageError, match=r"a\.txt arrived damaged 3 times: .* CRC32C AAAAAA=="):
        local_copy(other, str(tmp_path))
    assert not [path for path in (tmp_path / "copies").iterdir() if path.is_dir()]


def test_a_disk_without_room_is_told_before_anything_is_fetched(
    place: str, gcs_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(place, {"large.bin": DATA})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 70 << 20))
    with pytest.raises(StorageError, match=r"has 19 MiB, and .*copies has 70 MiB free; .*cache_di"):
        local_copy(everything(place), str(tmp_path))
    assert downloads(gcs_proxy) == []


def test_a_copy_that_lost_a_file_is_made_again(place: str, tmp_path: Path) -> None:
    upload(place, {"a.txt": b"one", "b.txt": b"two"})
    directory = local_copy(everything(place), str(tmp_path))
    (directory / "a.txt").unlink()
    assert held(local_copy(everything(place), str(tmp_path))) == {"a.txt": b"one", "b.txt": b"two"}


def test_a_place_that_cannot_be_written_is_one_line(place: str, tmp_path: Path) -> None:
    upload(place, {"a.txt": b"one"})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file stands where a directory is needed"):
        local_copy(everything(place), str(tmp_path / "file" / "cache"))


def test_of_several_processes_one_fetches(
    place: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    upload(place, {"large.bin": DATA})
    command = [sys.executable, "-c", COPY, place, str(tmp_path)]

    def run(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    gcs_proxy.bandwidth = 2e7
    gcs_proxy.requests.clear()
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(run, range(3)))
    assert [each.returncode for each in done] == [0, 0, 0], done[0].stderr
    assert len({each.stdout for each in done}) == 1
    assert held(Path(done[0].stdout.strip())) == {"large.bin": DATA}
    assert len(downloads(gcs_proxy)) == 3, "each range of the object once"


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_whole(
    place: str, gcs_proxy: FaultProxy, tmp_path: Path
) -> None:
    upload(place, {"a.txt": b"one", "large.bin": DATA})
    gcs_proxy.bandwidth = 4e6
    command = [sys.executable, "-c", COPY, place, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert re.search("fetching .*: 2 files, 19.1 MiB", process.stderr.readline())
    while not downloads(gcs_proxy):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    left = [path.name for path in (tmp_path / "copies").iterdir() if path.is_dir()]
    assert all(name.startswith(".fetch-") for name in left)
    gcs_proxy.bandwidth = None
    directory = local_copy(everything(place), str(tmp_path))
    assert held(directory) == {"a.txt": b"one", "large.bin": DATA}
    remove_abandoned_scratch(directory.parent)
    assert [path for path in directory.parent.iterdir() if path.is_dir()] == [directory]


def test_files_at_any_depth_of_either_kind_of_place(place: str, tmp_path: Path) -> None:
    files = {"a.txt": b"one", "b/c.txt": b"two", "b/.hidden": b""}
    upload(place, files)
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for uri in (place, str(tmp_path)):
        found = open_location(uri).walk(most=3)
        assert [(entry.name, entry.size) for entry in found] == [("a.txt", 3), ("b/c.txt", 3)]
        with pytest.raises(StorageError, match="more than 2 files"):
            open_location(uri).walk(most=2)
