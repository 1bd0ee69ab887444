"""Data sets in Cloud Storage: tokenized as local ones are, and told apart when they change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from google.cloud import storage

from tests.faults.proxy import FaultProxy
from trainer import prepare_tokens
from trainer.data.streams import INFO_NAME, streams_for
from trainer.runtime.errors import DataError, LiquidError, StorageError
from trainer.settings.config import TrainConfig


def put(uri: str, name: str, data: bytes | str) -> None:
    bucket, _, prefix = uri.removeprefix("gs://").partition("/")
    storage.Client().bucket(bucket).blob(f"{prefix}/{name}").upload_from_string(data)


def fetched(proxy: FaultProxy) -> list[str]:
    return [path for _, path in proxy.requests if "alt=media" in path]


@pytest.fixture
def source(tokens_dir: Path) -> Path:
    """The corpus that `tokens_dir` is of."""
    return tokens_dir.parent / "small-corpus"


@pytest.fixture
def place(gcs_bucket: str, source: Path) -> str:
    """A bucket's directory with it."""
    for path in source.iterdir():
        put(f"{gcs_bucket}/corpus", path.name, path.read_bytes())
    put(f"{gcs_bucket}/corpus", "notes.bin", b"something else")
    return f"{gcs_bucket}/corpus"


@pytest.fixture
def config(place: str, tokenizer_dir: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        teacher_name=str(tokenizer_dir),
        dataset_name=place,
        cache_dir=str(tmp_path / "cache"),
        local_workdir=str(tmp_path / "work"),
    )


def test_the_streams_are_those_of_the_same_local_files(
    config: TrainConfig, tokens_dir: Path, gcs_proxy: FaultProxy
) -> None:
    streams = streams_for(config)
    known = json.loads((tokens_dir / INFO_NAME).read_text())
    assert streams.info.fingerprint == known["fingerprint"]
    assert not any("notes" in path for path in fetched(gcs_proxy))
    gcs_proxy.requests.clear()
    assert streams_for(config).directory == streams.directory
    assert fetched(gcs_proxy) == []


def test_a_single_file(config: TrainConfig, place: str) -> None:
    streams = streams_for(replace(config, dataset_name=f"{place}/train.jsonl"))
    assert "drawn from train" in streams.info.validation_split


def test_files_in_folders(config: TrainConfig, gcs_bucket: str, source: Path) -> None:
    for split in ("train", "validation"):
        put(f"{gcs_bucket}/deep", f"{split}/a.jsonl", (source / f"{split}.jsonl").read_bytes())
    streams = streams_for(replace(config, dataset_name=f"{gcs_bucket}/deep"))
    assert streams.info.fingerprint == streams_for(config).info.fingerprint


def test_the_description_tells_the_version_and_a_changed_file_is_another(
    config: TrainConfig, place: str, source: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "tokens")
    info = prepare_tokens.run(config, output)
    revision = info.dataset["revision"]
    assert prepare_tokens.run(config, output) == info
    assert prepare_tokens.run(replace(config, dataset_revision=revision), output) == info
    put(place, "validation.jsonl", (source / "train.jsonl").read_bytes())
    with pytest.raises(DataError, match=f"other token streams: revision '{revision}', not '"):
        prepare_tokens.run(config, output)
    with pytest.raises(StorageError, match=f"was changed: .* not {revision}; put the former files"):
        streams_for(replace(config, dataset_revision=revision))
    assert streams_for(config).info.fingerprint != info.fingerprint


def test_what_is_no_data_set_is_one_line(config: TrainConfig, gcs_bucket: str) -> None:
    put(f"{gcs_bucket}/others", "a.bin", b"")
    put(f"{gcs_bucket}/mixed", "a.txt", "text")
    put(f"{gcs_bucket}/mixed", "b.jsonl", '{"text": "text"}')
    for name, message in (
        ("others", "has no file of a known kind"),
        ("mixed", f"data set '{gcs_bucket}/mixed' mixes json and text files"),
        ("nothing", "there is no object at"),
        ("others/b.txt", "there is no object at"),
    ):
        with pytest.raises(LiquidError, match=message) as told:
            streams_for(replace(config, dataset_name=f"{gcs_bucket}/{name}"))
        assert "\n" not in str(told.value)
