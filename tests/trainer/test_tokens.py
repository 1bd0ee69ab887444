from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from trainer import prepare_tokens
from trainer.config import TrainConfig
from trainer.errors import DataError
from trainer.teacher import load_tokenizer
from trainer.tokens import (
    IGNORED,
    BatchSampler,
    evaluation_batches,
    open_streams,
    streams_for,
    window_count,
)

STREAM = np.arange(1000, dtype=np.uint16)


def sampler(**changes: int) -> BatchSampler:
    options = {"block_size": 32, "global_batch": 8, "micro_batch": 8, "seed": 1} | changes
    return BatchSampler(STREAM, **options)


def config_for(dataset: Path, tokenizer_dir: Path, cache: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        teacher_name=str(tokenizer_dir), dataset_name=str(dataset), cache_dir=str(cache)
    )
    return replace(config, **changes)  # type: ignore[arg-type]


# ── windows and batches


def test_every_token_but_the_first_is_predicted_once_in_an_epoch() -> None:
    batches = sampler(global_batch=1, micro_batch=1)
    assert batches.windows == window_count(STREAM, 32) == 31
    labels = np.concatenate([batches.batch(step, 0)[1].numpy().ravel() for step in range(31)])
    assert sorted(labels) == list(range(1, 31 * 32 + 1))


def test_labels_are_the_next_tokens() -> None:
    inputs, labels = sampler().batch(3, 0)
    assert inputs.shape == labels.shape == (8, 32)
    assert (labels == inputs + 1).all()
    assert (inputs[:, 0] % 32 == 0).all()


def test_the_last_partial_window_is_dropped() -> None:
    assert [window_count(STREAM[:n], 10) for n in (10, 11, 20, 21)] == [0, 1, 1, 2]


def test_a_batch_is_a_pure_function_of_its_place() -> None:
    forward = sampler()
    sequence = [forward.window_indices(step, 0).tolist() for step in range(12)]
    fresh = [sampler().window_indices(step, 0).tolist() for step in reversed(range(12))]
    assert sequence == fresh[::-1]
    assert sequence[0] != sampler(seed=2).window_indices(0, 0).tolist()
    flat = sum(sequence, [])
    assert sorted(flat[:31]) == list(range(31))
    assert sorted(flat[31:62]) == list(range(31))
    assert flat[:31] != flat[31:62]


def test_processes_and_accumulation_divide_the_same_windows() -> None:
    whole = [sampler().window_indices(step, 0).tolist() for step in range(6)]
    accumulated = sampler(micro_batch=2)
    assert whole == [
        sum((accumulated.window_indices(step, m).tolist() for m in range(4)), [])
        for step in range(6)
    ]
    ranks = [sampler(micro_batch=2, rank=rank, world_size=2) for rank in (0, 1)]
    split = [
        sorted(i for r in ranks for m in range(2) for i in r.window_indices(step, m))
        for step in range(6)
    ]
    assert split == [sorted(windows) for windows in whole]


def test_a_stream_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"1000 training tokens do not fill one window of 1000 \+ 1"
    ):
        sampler(block_size=1000)


@pytest.mark.parametrize("context", [7, 32, 64, 999, 5000])
@pytest.mark.parametrize("limit", [0, 100])
def test_every_context_evaluates_the_same_tokens(context: int, limit: int) -> None:
    seen = [
        labels[labels != IGNORED].numpy()
        for _, labels in evaluation_batches(STREAM, context=context, batch=3, max_tokens=limit)
    ]
    assert np.array_equal(np.concatenate(seen), STREAM[1 : (limit or 999) + 1])
    for inputs, labels in evaluation_batches(STREAM, context=context, batch=3, max_tokens=limit):
        assert inputs.shape == labels.shape == (3, context)
        kept = labels != IGNORED
        assert (labels[kept] == inputs[kept] + 1).all()


# ── tokenizing


def test_documents_are_joined_by_eos(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    documents = ["The if statement.", "", "  \n", "A while loop."]
    lines = [json.dumps({"text": text}) for text in documents]
    (source / "train.jsonl").write_text("\n".join(lines))
    (source / "validation.jsonl").write_text(json.dumps({"text": "for"}))
    streams = streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    tokenizer = load_tokenizer(str(tokenizer_dir))
    eos = tokenizer.eos_token_id
    expected = [*tokenizer.encode(documents[0]), eos, *tokenizer.encode(documents[3]), eos]
    assert streams.train.tolist() == expected
    assert streams.train.dtype == np.uint16
    assert streams.validation.tolist() == [*tokenizer.encode("for"), eos]
    assert tokenizer.decode(streams.train.tolist()).count("<|endoftext|>") == 2


def write_text(directory: Path, texts: list[str]) -> None:
    for number, text in enumerate(texts[:-2]):
        split = directory / "train"
        split.mkdir(parents=True, exist_ok=True)
        (split / f"part-{number:03}.txt").write_text(text, encoding="utf-8")
    (directory / "validation").mkdir()
    for number, text in enumerate(texts[-2:]):
        (directory / "validation" / f"part-{number}.txt").write_text(text, encoding="utf-8")


def write_rows(directory: Path, texts: list[str], kind: str) -> None:
    directory.mkdir()
    for name, part in (("train", texts[:-2]), ("validation", texts[-2:])):
        rows = datasets.Dataset.from_dict({"text": part})
        if kind == "json":
            rows.to_json(str(directory / f"{name}.json"))
        else:
            rows.to_parquet(str(directory / f"{name}.parquet"))


@pytest.mark.parametrize("kind", ["text", "json", "parquet", "saved"])
def test_every_local_format_gives_the_same_tokens(
    kind: str, texts: list[str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    source, few = tmp_path / "data", [text.replace("\r", "") for text in texts[:8]]
    if kind == "text":
        write_text(source, few)
    elif kind == "saved":
        parts = {"train": few[:-2], "validation": few[-2:]}
        datasets.DatasetDict(
            {name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()}
        ).save_to_disk(str(source))
    else:
        write_rows(source, few, kind)
    streams = streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    tokenizer = load_tokenizer(str(tokenizer_dir))
    expected: list[int] = []
    for text in few[:-2]:
        expected += [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert streams.train.tolist() == expected


def test_a_single_file_and_its_held_out_part(
    texts: list[str], tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "all.jsonl"
    source.write_text("\n".join(json.dumps({"text": text[:300]}) for text in texts * 5))
    streams = streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    held_out = math.ceil(len(texts) * 5 * 0.01)
    assert streams.info.validation_split.startswith(f"{held_out} documents (1 %) drawn from train")
    assert (streams.validation == streams.info.eos_token_id).sum() == held_out
    total = len(texts) * 5
    assert (streams.train == streams.info.eos_token_id).sum() == total - held_out


def test_a_second_start_and_another_context_retokenize_nothing(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(corpus, tokenizer_dir, tmp_path / "cache", block_size=64)
    first = streams_for(config)
    stamp = (first.directory / "train.bin").stat().st_mtime_ns

    def fail(*args: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr("trainer.tokens.prepare_streams", fail)
    again = streams_for(replace(config, block_size=512))
    assert again.directory == first.directory
    assert (again.directory / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(AssertionError, match="tokenized again"):
        streams_for(replace(config, text_column="other"))


def test_changed_data_is_another_stream(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"document number {n}"}) for n in range(5)]
    source.write_text("\n".join(rows))
    config = config_for(source, tokenizer_dir, tmp_path / "cache")
    before = len(streams_for(config).train)
    source.write_text("\n".join(rows * 3))
    assert len(streams_for(config).train) > before


def test_prepared_streams_serve_in_place_of_a_data_set(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = config_for(corpus, tokenizer_dir, tmp_path / "cache")
    info = prepare_tokens.run(config, str(tmp_path / "tokens"))
    streams = streams_for(TrainConfig(tokens_dir=str(tmp_path / "tokens")))
    assert streams.info == info
    assert len(streams.train) == info.train_tokens
    with pytest.raises(DataError, match="is not empty"):
        prepare_tokens.run(config, str(tmp_path / "tokens"))


def test_damaged_streams_are_noticed(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    streams = streams_for(config_for(corpus, tokenizer_dir, tmp_path / "cache"))
    path = streams.directory / "train.bin"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match="is damaged"):
        open_streams(streams.directory)
    (streams.directory / "tokens.json").write_text("{")
    with pytest.raises(DataError, match="does not hold token streams"):
        open_streams(streams.directory)


def test_data_sets_that_cannot_be_used(tokenizer_dir: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"body": "x"}\n{"body": "y"}')
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": ')
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n{"text": ""}')
    for source, message in (
        (empty, "no file of a known kind"),
        (wrong, "has no column 'text'; it has body; give --text_column"),
        (broken, "cannot be loaded"),
        (blank, "holds no text"),
    ):
        config = config_for(source, tokenizer_dir, tmp_path / "cache")
        with pytest.raises(DataError, match=message) as caught:
            streams_for(config)
        assert "\n" not in str(caught.value)
    assert not any((tmp_path / "cache" / "tokens").glob("*")), "nothing half-written is left"


def test_an_unreachable_hub_data_set_is_one_line(tokenizer_dir: Path, tmp_path: Path) -> None:
    config = config_for(Path("no-such-owner/no-such-data"), tokenizer_dir, tmp_path / "cache")
    with pytest.raises(DataError, match="'no-such-owner/no-such-data' cannot be loaded"):
        streams_for(config)
