"""The preparing stage: what is left as it is, what is refused, and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer import prepare_tokens
from trainer.data import streams as tokens
from trainer.runtime.errors import DataError, LiquidError
from trainer.settings.config import TrainConfig
from trainer.storage.base import Location
from trainer.storage.places import open_location


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"document number {n}", "title": str(n)}) for n in range(5)]
    path.write_text("\n".join(rows))
    return path


@pytest.fixture
def config(source: Path, tokenizer_dir: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        teacher_name=str(tokenizer_dir),
        dataset_name=str(source),
        cache_dir=str(tmp_path / "cache"),
        local_workdir=str(tmp_path / "work"),
    )


@pytest.fixture(params=["local", "gs"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out" / "tokens")
    return f"{request.getfixturevalue('gcs_bucket')}/tokens"


def held(output: str) -> dict[str, int]:
    """Every file with the number of the write that made it."""
    places = [open_location(output), open_location(f"{output}/tokenizer")]
    return {place.child(e.name): e.generation for place in places for e in place.list()}


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, a data set that is loaded fails the test."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the data set is loaded")

    return lambda: monkeypatch.setattr(tokens, "load_corpus", refuse)


def test_the_same_again_is_left_as_it_is(
    config: TrainConfig, output: str, no_reading: Callable[[], None]
) -> None:
    first = prepare_tokens.run(config, output)
    before = held(output)
    assert {name.rpartition("/")[2] for name in before} >= {"train.bin", "tokens.json"}
    no_reading()
    assert prepare_tokens.run(config, output) == first
    assert held(output) == before


def test_anything_else_there_is_refused(
    config: TrainConfig, output: str, source: Path, no_reading: Callable[[], None]
) -> None:
    prepare_tokens.run(config, output)
    before = held(output)
    no_reading()
    other = source.with_name("b.jsonl")
    other.write_text(source.read_text())
    for changed, message in (
        ({"text_column": "title"}, "holds other token streams: text_column 'text', not 'title'"),
        ({"dataset_name": str(other)}, f"name '{source}', not '{other}'"),
        ({"dataset_revision": "main"}, "revision None, not 'main'"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_tokens.run(replace(config, **changed), output)  # type: ignore[arg-type]
    source.write_text(source.read_text().replace("number", "numbre"))
    with pytest.raises(DataError, match="its files or the tokenizer may have changed since"):
        prepare_tokens.run(config, output)
    assert held(output) == before


def test_streams_that_do_not_say_what_they_were_made_of_are_not_taken(
    config: TrainConfig, output: str
) -> None:
    """As an earlier release has written them."""
    prepare_tokens.run(config, output)
    described = json.loads(place(output).read_bytes("tokens.json", limit=1 << 20))
    del described["dataset"]["source"]
    place(output).put_bytes(json.dumps(described).encode(), "tokens.json")
    with pytest.raises(DataError, match="cannot be told to be the same"):
        prepare_tokens.run(config, output)


def place(output: str) -> Location:
    """The output, where what is there may be replaced."""
    location = open_location(output)
    location.list()
    return location


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"mine", "is not empty; give a new directory"),
        ("tokens.json", b"{", "tokens.json"),
        ("tokens.json", b'{"format": 9}', "tokens.json|format 9"),
        ("train.bin", b"short", "train.bin is damaged: 5 bytes"),
    ],
)
def test_what_cannot_be_token_streams_is_refused(
    config: TrainConfig, output: str, name: str, content: bytes, message: str
) -> None:
    if name == "train.bin":
        prepare_tokens.run(config, output)
    place(output).put_bytes(content, name)
    before = held(output)
    with pytest.raises(DataError, match=message) as caught:
        prepare_tokens.run(config, output)
    assert "\n" not in str(caught.value)
    assert held(output) == before


def test_what_a_killed_upload_has_left_is_replaced(config: TrainConfig, gcs_bucket: str) -> None:
    open_location(f"{gcs_bucket}/tokens").put_bytes(b"half", "train.bin")
    info = prepare_tokens.run(config, f"{gcs_bucket}/tokens")
    sizes = {entry.name: entry.size for entry in open_location(f"{gcs_bucket}/tokens").list()}
    assert sizes["train.bin"] == 2 * info.train_tokens


def test_outputs_that_cannot_be_written_are_told_first(
    config: TrainConfig, tmp_path: Path, gcs_bucket: str
) -> None:
    """No data set and no tokenizer is there to be loaded."""
    (tmp_path / "file").write_text("mine")
    config = replace(config, teacher_name="none", dataset_name="none")
    for output, message in (
        (str(tmp_path / "file"), "is a file; give a new directory"),
        (str(tmp_path / "file" / "out"), "a file is in the way"),
        ("/proc/none/out", "writing to '/proc' failed"),
        ("", "'' is neither gs://bucket/path nor a local path"),
        (f"{gcs_bucket}-none/out", "does not exist"),
    ):
        with pytest.raises(LiquidError, match=message):
            prepare_tokens.run(config, output)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_directory_will_do_and_nothing_is_left_beside_it(
    config: TrainConfig, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "tokens").mkdir(parents=True)
    prepare_tokens.run(config, str(tmp_path / "out" / "tokens"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokens"]
    source.write_text('{"text": " "}\n{"text": ""}')
    with pytest.raises(DataError, match="holds no text"):
        prepare_tokens.run(config, str(tmp_path / "out" / "more"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokens"]
