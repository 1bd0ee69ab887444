"""Wherever a path is read it leads to a stored file of bounded size, or one line refuses it.

The readers run in a process of little memory: one that waits at a pipe, or reads a device to its
end, fails here by the time limit or by the memory's.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.samples import save_student
from trainer.runtime.errors import StorageError
from trainer.storage.base import StorageTooLargeError
from trainer.storage.files import check_files, open_regular, read_regular, remove_abandoned
from trainer.storage.places import open_location

READERS = """
    import resource, sys
    from pathlib import Path
    from trainer import pick_best
    from trainer.checkpoints.snapshots import Snapshots, read_from
    from trainer.data.corpus import load_corpus
    from trainer.data.streams import open_streams
    from trainer.models.hugging_face import load_tokenizer
    from trainer.models.teacher import read_teacher_spec
    from trainer.runtime.errors import LiquidError
    from trainer.settings.config import TrainConfig
    from trainer.settings.hf_token import find_hf_token
    from trainer.settings.layers import settings_from_yaml
    from trainer.storage.places import open_location
    import datasets, transformers

    at = Path(sys.argv[1])
    def path(name): return str(at / name)
    def token(**given): return lambda: find_hf_token(TrainConfig(**given), {})
    def run(name):
        snapshots = Snapshots(path(name), path("work"))
        snapshots.newest()
        snapshots.check_writable()
    def corpus(name): return lambda: load_corpus(
        TrainConfig(dataset_name=path(name), cache_dir=path("cache")))
    readers = {
        "sidecar of a run": lambda: run("sidecar"),
        "sidecar of a file": lambda: read_from(path("sidecar/best.pt"), at / "work"),
        "sidecar to pick": lambda: pick_best.run([path("sidecar")], "val_loss_student"),
        "weights of a run": lambda: run("weights"),
        "weights of a file": lambda: read_from(path("weights/best.pt"), at / "work"),
        "checkpoint": lambda: read_from(path("thing"), at / "work"),
        "tokens.json": lambda: open_streams(at / "described"),
        "train.bin": lambda: open_streams(at / "stream"),
        "settings": lambda: settings_from_yaml(path("thing")),
        "token file": token(hf_token_file=path("thing")),
        "token object": token(hf_token_gcs_uri=path("thing")),
        "data set": corpus("thing"),
        "file of a data set": corpus("corpus"),
        "teacher": lambda: read_teacher_spec(path("teacher")),
        "tokenizer": lambda: load_tokenizer(path("tokenizer")),
        "list of writers": lambda: open_location(path("written")).put_bytes(b"x", "a"),
    }
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30),) * 2)
    for name in sys.argv[2:]:
        read = readers[name]
        print(name, end=": ", flush=True)
        try:
            read()
            print("accepted")
        except LiquidError as error:
            print("refused:", error, flush=True)
    """


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bind(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def made_up(path: Path) -> None:
    path.symlink_to("/proc/self/smaps")


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": pipe,
    "device": device,
    "directory": Path.mkdir,
    "socket": bind,
    "made up": made_up,
    "large": large,
}

BOUNDED = (
    *("sidecar of a run", "sidecar of a file", "sidecar to pick", "weights of a run"),
    *("weights of a file", "checkpoint", "tokens.json", "settings", "token file", "token object"),
)
WRITTEN = ("data set", "file of a data set", "teacher", "tokenizer")
"""Readers that take files of any size that is not made of holes."""

OTHERS = ("train.bin", "list of writers")
"""Readers that read no more than a piece."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_refuses_what_is_no_file_in_one_line(kind: str, tmp_path: Path) -> None:
    make = KINDS[kind]
    for name in ("sidecar", "weights"):
        (tmp_path / name).mkdir()
        save_student(tmp_path / name / "best.pt")
    names = {
        "sidecar": "best.pt.meta.json",
        "weights": "best.pt",
        "described": "tokens.json",
        "stream": "train.bin",
        "corpus": "train.jsonl",
        "teacher": "config.json",
        "tokenizer": "tokenizer.json",
        "written": ".writers.json",
    }
    for directory, name in names.items():
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / name).unlink(missing_ok=True)
        make(tmp_path / directory / name)
    described = {
        "train_tokens": 1 << 41,
        "validation_tokens": 2,
        "vocab_size": 9,
        "dtype": "uint16",
        "eos_token_id": 0,
        "tokenizer": "",
        "dataset": {},
        "validation_split": "",
        "fingerprint": "",
        "format": 1,
    }
    (tmp_path / "stream" / "tokens.json").write_text(json.dumps(described))
    (tmp_path / "stream" / "validation.bin").write_bytes(b"1234")
    (tmp_path / "work").mkdir()
    make(tmp_path / "thing.jsonl")
    (tmp_path / "thing").symlink_to("thing.jsonl")
    readers = (*BOUNDED, *WRITTEN, *(() if kind == "large" else OTHERS))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READERS), str(tmp_path), *readers],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    for name in readers:
        assert said[name].startswith("refused: "), f"{name} of a {kind}: {said[name]}"


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", limit=7) == b"content"
    (tmp_path / "empty").write_bytes(b"")
    assert read_regular(tmp_path / "empty", limit=0) == b""
    check_files(*tmp_path.iterdir())
    assert open_location(str(tmp_path)).read_bytes("link", limit=7) == b"content"


def test_a_file_over_the_bound_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(StorageTooLargeError, match="file has 7 bytes; at most 6 are expected here"):
        open_regular(tmp_path / "file", limit=6)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pipe", "it is a pipe, not a file"),
        ("socket", "it is a socket, not a file"),
        ("device", "it is a device, not a file"),
        ("directory", "it is a directory, not a file"),
        ("made up", "its content is made up by the system"),
    ],
)
def test_what_it_is_instead_is_told(kind: str, words: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "best.pt")
    with pytest.raises(StorageError, match=words) as caught:
        open_location(str(tmp_path)).read_bytes("best.pt", limit=10)
    assert str(tmp_path / "best.pt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_holes_are_told_from_small_ones(tmp_path: Path) -> None:
    (tmp_path / "written").write_bytes(b"x" * 100_000)
    (tmp_path / "empty").write_bytes(b"")
    with (tmp_path / "half").open("wb") as file:
        file.write(b"x" * 100_000)
        file.truncate(150_000)
    check_files(*tmp_path.iterdir())
    with (tmp_path / "holes").open("wb") as file:
        file.write(b"x" * 100_000)
        file.truncate(250_000)
    with pytest.raises(StorageError, match="holes' failed: most of its 250000 bytes were never"):
        check_files(*tmp_path.iterdir())


def test_a_path_with_a_nul_is_no_path() -> None:
    with pytest.raises(OSError, match="its path has a NUL character"):
        open_regular("a\0b")


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_a_location_with_something_else_than_files_is_told_of_at_its_first_listing(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nothing")
    assert open_location(str(tmp_path)).list() == []
    KINDS[kind](tmp_path / "best.pt")
    with pytest.raises(StorageError, match=f"best.pt' failed: it is a {kind}, not a file"):
        open_location(str(tmp_path)).list()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_cleaning_up_waits_for_nobody(kind: str, tmp_path: Path) -> None:
    left = tmp_path / ".best.pt.1-abcdef01.tmp"
    KINDS[kind](left)
    os.utime(left, (0, 0), follow_symlinks=False)
    remove_abandoned(tmp_path)
    assert os.path.lexists(left) == (kind != "large")
