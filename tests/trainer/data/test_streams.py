from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

from pipelines import embedded
from trainer import prepare_tokens
from trainer.data.batches import IGNORED, BatchSampler, evaluation_batches, window_count
from trainer.data.local_files import LocalData, load
from trainer.data.streams import _largest_seen, open_streams, streams_for, tokenizer_fingerprint
from trainer.models.hugging_face import load_tokenizer
from trainer.runtime.errors import DataError, LiquidError, StorageError, UsageError
from trainer.settings.config import TrainConfig

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
    (source / "train.jsonl").write_text(lines(*documents))
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

    monkeypatch.setattr("trainer.data.streams.write_streams", fail)
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


def test_streams_of_another_tokenizer_are_refused(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, other = tmp_path / "tokens", tmp_path / "other"
    prepare_tokens.run(config_for(corpus, tokenizer_dir, tmp_path / "cache"), str(tokens))
    embedded.build_tokenizer(corpus, other, vocab_size=511)
    config = TrainConfig(tokens_dir=str(tokens), teacher_name=str(other))
    with pytest.raises(DataError, match=f"the tokenizer of '{tokenizer_dir}'.* teacher '{other}'"):
        streams_for(config)
    same = replace(config, teacher_name=str(tokens / "tokenizer"))
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert streams_for(same).info.tokenizer_fingerprint
        assert not caplog.text
        streams_for(replace(config, teacher_name=str(tmp_path / "none")))
        assert "is not compared with the teacher's tokenizer" in caplog.text
        described = json.loads((tokens / "tokens.json").read_text())
        del described["tokenizer_fingerprint"]
        (tokens / "tokens.json").write_text(json.dumps(described))
        streams_for(config)
        assert "does not tell the tokenizer it was made with" in caplog.text


def gpt2_tokenizer(directory: Path, tokenizer_dir: Path) -> Path:
    """As gpt2 has it on the hub: a vocabulary and merges, without tokenizer.json."""
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    GPT2Config(vocab_size=512, bos_token_id=0, eos_token_id=0).save_pretrained(str(directory))
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return directory


def unigram_tokenizer(directory: Path) -> Path:
    """As Llama and T5 have it."""
    model = models.Unigram([("<unk>", 0.0), ("▁if", -1.0), ("f", -2.0), ("▁i", -3.0)], unk_id=0)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize("kind", ["byte-level bpe", "gpt2", "unigram"])
def test_the_tokenizers_fingerprint_outlives_saving_and_use(
    kind: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    if kind == "gpt2":
        directory = gpt2_tokenizer(tmp_path / "first", tokenizer_dir)
    else:
        directory = unigram_tokenizer(tmp_path / "first") if kind == "unigram" else tokenizer_dir
    tokenizer = load_tokenizer(str(directory))
    tokenizer.save_pretrained(str(tmp_path / "copy"))
    before = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "copy"))) == before
    state = tokenizer.backend_tokenizer.to_str()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["if", "if if if if"], truncation=True, max_length=3, padding=True)
    assert tokenizer.backend_tokenizer.to_str() != state, "the call has changed it"
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(str(tmp_path / "used"))
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "used"))) == before
    tokenizer.add_tokens(["more"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_damaged_streams_are_noticed(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    streams = streams_for(config_for(corpus, tokenizer_dir, tmp_path / "cache"))
    path = streams.directory / "train.bin"
    whole = path.read_bytes()
    for damage in (b"\xff" * len(whole), whole[:-2] + b"\x00\x02"):  # 512 = 0x0200
        path.write_bytes(damage)
        with pytest.raises(DataError, match="train.bin is damaged: it has token (65535|512), over"):
            open_streams(streams.directory)
    path.write_bytes(whole[:-3])
    with pytest.raises(DataError, match="is damaged"):
        open_streams(streams.directory)
    (streams.directory / "tokens.json").write_text("{")
    with pytest.raises(DataError, match="does not hold token streams"):
        open_streams(streams.directory)


def test_a_large_stream_is_sampled_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    tokens = (1 << 27) + 5
    with path.open("wb") as file:
        file.truncate(2 * tokens)  # a file of holes takes no space
    stream = np.memmap(path, dtype=np.uint16, mode="r+")
    assert _largest_seen(stream) == 0
    stream[-1] = 7
    assert _largest_seen(stream) == 7
    stream[0] = 9
    assert _largest_seen(stream) == 9
    stream[tokens // 2 : tokens // 2 + (1 << 17)] = 11
    assert _largest_seen(stream) == 11


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "foo"),
        ("dtype", "float32"),
        ("dtype", "uint8"),
        ("dtype", None),
        ("train_tokens", "12"),
        ("validation_tokens", 0),
        ("vocab_size", 5.5),
        ("eos_token_id", True),
        ("fingerprint", 3),
    ],
)
def test_descriptions_that_cannot_be_true_are_refused(
    name: str, value: object, described: Path
) -> None:
    path = described / "tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(DataError, match=f"tokens.json: {name} is {value!r}, not") as caught:
        open_streams(described)
    assert "\n" not in str(caught.value)


@pytest.fixture
def described(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A directory of small token streams."""
    source = tmp_path / "a.jsonl"
    source.write_text(lines("if", "or"))
    return streams_for(config_for(source, tokenizer_dir, tmp_path / "cache")).directory


def write_files(directory: Path, files: dict[str, str]) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(content, encoding="utf-8")
    return directory


def lines(*texts: object) -> str:
    return "\n".join(json.dumps({"text": text}) for text in texts)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file of a known kind"),
        ({"a.txt": "x", "b.jsonl": lines("x")}, "mixes json and text files"),
        ({"a.jsonl": '{"body": "x"}\n{"body": "y"}'}, "no column 'text'; it has body; give --text"),
        ({"a.jsonl": '{"text": '}, "cannot be loaded: JSON parse error"),
        (
            {"a.jsonl": lines(" ", "")},
            "split 'train': column 'text' .of type string. holds no text",
        ),
        ({"a.jsonl": lines(1, 2)}, "column 'text' .of type int64. holds no text"),
        ({"a.jsonl": lines(None, None)}, "column 'text' .of type null. holds no text"),
        ({"a.txt": ""}, "has no text: .*/data/a.txt is empty"),
        (
            {"train.jsonl": "\n", "test.jsonl": lines("x")},
            "no training text: .*train.jsonl is empty",
        ),
        ({"a.txt": "x"}, "one document only, of 1 characters: too few to hold any out"),
        (
            {"a.jsonl": lines("x", "y"), "README.md": "---\nlicense: [\n---\n"},
            "the YAML at the head of its README.md cannot be read: .*line 1",
        ),
        (
            {"a.jsonl": lines("x"), "README.md": "---\n- a\n---\n"},
            "metadata block should be a dict",
        ),
        ({"state.json": "{}", "dataset_info.json": "{}"}, "cannot be loaded: '_data_files'"),
    ],
)
def test_data_sets_that_cannot_be_used(
    files: dict[str, str], message: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = config_for(write_files(tmp_path / "data", files), tokenizer_dir, tmp_path / "cache")
    with pytest.raises(DataError, match=message) as caught:
        streams_for(config)
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "cache" / "tokens").glob("*")), "nothing half-written is left"


@pytest.mark.parametrize("name", ["/no/such", "./no", "~/no", "no/such/place"])
def test_a_data_set_path_that_does_not_exist(
    name: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = replace(config_for(tmp_path, tokenizer_dir, tmp_path / "cache"), dataset_name=name)
    with pytest.raises(DataError, match="no such file or directory$"):
        streams_for(config)


@pytest.mark.parametrize("kind", ["file", "saved"])
def test_a_configuration_of_what_has_none_is_refused(
    kind: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "a.txt"
    if kind == "file":
        source.write_text("x y z")
    else:
        datasets.Dataset.from_dict({"text": ["x", "y"]}).save_to_disk(str(source))
    config = config_for(source, tokenizer_dir, tmp_path / "cache", dataset_config="main")
    with pytest.raises(UsageError, match="--dataset_config=main: .*; leave it out"):
        streams_for(config)


def test_a_configuration_that_a_directory_does_not_have_is_named(
    corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = config_for(corpus, tokenizer_dir, tmp_path / "cache", dataset_config="main")
    with pytest.raises(DataError, match="'main' not found.*; give --dataset_config with one of"):
        streams_for(config)


def decoded(tokenizer_dir: Path, stream: np.ndarray) -> list[str]:
    text = load_tokenizer(str(tokenizer_dir)).decode(stream.tolist())
    return sorted(text.split("<|endoftext|>")[:-1])


@pytest.mark.parametrize(
    ("files", "train", "validation", "policy"),
    [
        # `datasets` by itself skips suffixes in capitals, and .text
        ({"a.TXT": "if", "b.Txt": "or"}, ["or"], ["if"], "1 documents"),
        (
            {"train.TXT": "if", "more_train.text": "or", "validation.TXT": "and"},
            ["if", "or"],
            ["and"],
            "the data set's validation split",
        ),
        ({"train.JSONL": lines("if"), "README.md": "# Words"}, ["i"], ["f"], "the last 1 %"),
        # It stops at a split without rows
        (
            {"train.jsonl": lines("if"), "validation.jsonl": "", "test.jsonl": lines("or")},
            ["if"],
            ["or"],
            "the data set's test split",
        ),
        ({"train.jsonl": lines("if", "or"), "validation.jsonl": ""}, ["or"], ["if"], "1 documents"),
        (
            {"train.jsonl": lines("if"), "validation.jsonl": lines(""), "test.jsonl": lines("or")},
            ["if"],
            ["or"],
            "the data set's test split",
        ),
    ],
)
def test_files_that_the_loader_leaves_out_or_stops_at(
    files: dict[str, str],
    train: list[str],
    validation: list[str],
    policy: str,
    tokenizer_dir: Path,
    tmp_path: Path,
) -> None:
    source = write_files(tmp_path / "data", files)
    streams = streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    assert streams.info.validation_split.startswith(policy)
    assert decoded(tokenizer_dir, streams.train) == train
    assert decoded(tokenizer_dir, streams.validation) == validation


@pytest.mark.parametrize(
    ("text", "cut"),
    [("word " * 200, 989), ("x" * 5000, 4950), ("word " * 200 + "\n" * 500, 989)],
    ids=["words", "no whitespace near", "blank end"],
)
def test_the_end_of_a_single_document_is_held_out(
    text: str, cut: int, tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "book.txt"
    source.write_text(text)
    streams = streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    kept, held = (decoded(tokenizer_dir, s) for s in (streams.train, streams.validation))
    assert (kept, held) == ([text[:cut]], [text[cut:]])
    assert streams.info.validation_split == (
        f"the last 1 % ({len(text) - cut} characters) of the only document of train"
    )


def test_blank_rows_are_neither_held_out_nor_passed_over_in_silence(
    tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(lines("if", None, " ", "", "\n", None, "or", ""))
    with caplog.at_level("WARNING"):
        streams = streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    assert streams.info.validation_split.startswith("1 documents (1 %)")
    found = decoded(tokenizer_dir, streams.train) + decoded(tokenizer_dir, streams.validation)
    assert sorted(found) == ["if", "or"]
    assert "split train: 6 of 8 rows have no text in column 'text' (of type string)" in caplog.text
    caplog.clear()
    source.write_text(lines("if", None, "", "or"))
    streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    assert "have no text" not in caplog.text


def test_text_that_gives_no_tokens_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Its vocabulary lacks every letter of the text, and it has no token for the unknown."""
    backend = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    backend["model"] |= {"vocab": {"<|endoftext|>": 0, "q": 1, "z": 2}, "merges": []}
    backend["added_tokens"] = backend["added_tokens"][:1]
    odd = tmp_path / "odd"
    shutil.copytree(tokenizer_dir, odd)
    (odd / "tokenizer.json").write_text(json.dumps(backend))
    source = tmp_path / "a.jsonl"
    source.write_text(lines("abc", "def", "abc"))
    with pytest.raises(DataError, match="the train split gives no tokens with the tokenizer of"):
        streams_for(config_for(source, odd, tmp_path / "cache"))
    assert not any((tmp_path / "cache" / "tokens").glob("*"))


@pytest.mark.soak
def test_an_unreachable_hub_data_set_is_one_line(tokenizer_dir: Path, tmp_path: Path) -> None:
    config = config_for(Path("no-such-owner/no-such-data"), tokenizer_dir, tmp_path / "cache")
    with pytest.raises(DataError, match="'no-such-owner/no-such-data' cannot be loaded"):
        streams_for(config)


def nested(depth: int) -> str:
    return '{"text": ' + "[" * depth + "]" * depth + "}"


def not_utf_8(path: Path) -> None:
    """A parquet file whose text column says that it is UTF-8, and is Latin-1."""
    column = pa.array(["na\xefve".encode("latin-1")] * 4, pa.binary())
    text = pa.StringArray.from_buffers(4, *column.buffers()[1:])
    pq.write_table(pa.table({"text": text}), path)


@pytest.mark.parametrize("depth", [900, 5000, 100_000, 3_000_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_nested_deeply_is_one_line(
    name: str, depth: int, tokenizer_dir: Path, tmp_path: Path
) -> None:
    content = nested(depth) if name == "a.jsonl" else f"[{nested(depth)}]"
    source = write_files(tmp_path / "data", {name: content})
    with pytest.raises(DataError, match=r"data set '.*/data'(, split 'train')?") as caught:
        streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "cache" / "tokens").glob("*"))


def test_a_parquet_file_that_is_not_utf_8(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    not_utf_8(source)
    with pytest.raises(DataError, match="UTF-?8|utf-8") as caught:
        streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" + b"\0" * 60 + b"PAR1", b"garbage" * 99])
def test_a_damaged_parquet_file(content: bytes, tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    source.write_bytes(content)
    with pytest.raises(DataError, match="a.parquet' cannot be loaded: ") as caught:
        streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["https://example.com/a.txt", "http://example.com", "HTTPS://example.com/x", "ftp://h/a/b"],
)
def test_a_web_address_is_no_data_set(name: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    config = replace(config_for(tmp_path, tokenizer_dir, tmp_path / "cache"), dataset_name=name)
    with pytest.raises(DataError, match="it is a web address; download it and give the file$"):
        streams_for(config)


@pytest.mark.parametrize("name", ["a\0b", "s3://b/x", "file:///etc/passwd", "hf://a/b", "x:y"])
def test_what_is_no_name_of_a_data_set(name: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    config = replace(config_for(tmp_path, tokenizer_dir, tmp_path / "cache"), dataset_name=name)
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        streams_for(config)
    assert "\n" not in str(caught.value)


def test_a_data_set_that_refers_to_the_web_is_not_fetched(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files: https://example.com/a.jsonl\n---\n"
    source = write_files(tmp_path / "data", {"a.jsonl": lines("x", "y"), "README.md": card})
    with pytest.raises(DataError, match="cannot be loaded: ") as caught:
        streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_a_data_set_is_read_once(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child process reads it, and this one takes what that has kept."""
    source = write_files(tmp_path / "data", {"a.jsonl": lines("if", "or")})

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(datasets.builder.DatasetBuilder, "_download_and_prepare", fail)
    assert len(streams_for(config_for(source, tokenizer_dir, tmp_path / "cache")).train)


@pytest.mark.parametrize("place", ["data/a.txt", "data/a.jsonl", "data/README.md"])
def test_a_pipe_is_no_data_set(place: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    source = write_files(tmp_path / "data", {"b.txt": "some words of text " * 9})
    os.mkfifo(tmp_path / place)
    for name in (source, tmp_path / place):
        with pytest.raises(StorageError, match="failed: it is a pipe, not a file"):
            streams_for(config_for(name, tokenizer_dir, tmp_path / "cache"))


def test_a_text_too_long_for_one_document(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    with source.open("wb") as file:
        file.truncate(1 << 40)  # a file of holes takes no space
    data = LocalData(str(source), "a.txt", None, str(tmp_path / "cache"))
    with pytest.raises(DataError, match="1099511627776 bytes, and a text file is one document"):
        load(data)  # a file of holes is otherwise refused for these


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet", "data.arrow"])
def test_files_of_holes_are_refused_before_anything_is_read(
    name: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = write_files(tmp_path / "data", {"b.jsonl": lines("x", "y"), name: lines("x", "y")})
    with (source / name).open("ab") as file:
        file.truncate(1 << 42)
    with pytest.raises(StorageError, match="most of its 4398046511104 bytes were never written"):
        streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))


def test_a_data_sets_card_is_not_read_whole_before_its_size_is_known(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "TEXT.TXT").write_text("Some words of text. " * 500)
    (source / "README.md").write_bytes(b"#" * (17 << 20))
    with pytest.raises(LiquidError, match=r"README\.md has 17825792 bytes; at most 16777216"):
        streams_for(config_for(source, tokenizer_dir, tmp_path / "cache"))
