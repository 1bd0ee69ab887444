"""Documents in pieces: the ids of the whole, in bounded memory; tokenizers that never end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from trainer.data import tokenizing
from trainer.data.tokenizing import Encoder
from trainer.models.hugging_face import load_tokenizer
from trainer.runtime.errors import DataError

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def prose(texts: list[str]) -> str:
    """300,000 characters, other scripts, accents, runs of spaces and an added token among them."""
    odd = "naïve e\u0301t\u00e9 東京都 Übergröße ﬁn½  \t\t  <|endoftext|> 1234567 👩‍👩‍👧   \r\n\r\n"
    return "".join(f"{text[:4000]} {odd}{text[4000:8000]}" for text in texts)[:300_000]


def wrapped(backend: Tokenizer) -> Any:
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def trained(backend: Tokenizer, trainer: Any, prose: str) -> Any:
    backend.train_from_iterator([prose[:60_000]], trainer)
    return wrapped(backend)


def embedded_bpe(prose: str, tokenizer_dir: Path) -> Any:
    return load_tokenizer(str(tokenizer_dir))


def bpe_with_prefix_space(prose: str, tokenizer_dir: Path) -> Any:
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrapped(backend)


def bpe_of_llama_3(prose: str, tokenizer_dir: Path) -> Any:
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return wrapped(backend)


def bpe_without_pre_tokenizer(prose: str, tokenizer_dir: Path) -> Any:
    """As Llama 2: no words, but no token that reaches from one into the next."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"])
    backend.train_from_iterator([prose[:60_000]], trainer)
    backend.normalizer, backend.pre_tokenizer = spaces, None
    return wrapped(backend)


def unigram(prose: str, tokenizer_dir: Path) -> Any:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    return trained(backend, trainer, prose)


def unigram_without_normalizer(prose: str, tokenizer_dir: Path) -> Any:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    return trained(backend, trainer, prose)


def word_piece(prose: str, tokenizer_dir: Path) -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]"])
    return trained(backend, trainer, prose)


def word_piece_without_normalizer(prose: str, tokenizer_dir: Path) -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]"])
    return trained(backend, trainer, prose)


KINDS = [
    embedded_bpe,
    bpe_with_prefix_space,
    bpe_of_llama_3,
    bpe_without_pre_tokenizer,
    unigram,
    unigram_without_normalizer,
    word_piece,
    word_piece_without_normalizer,
]


def encoded(encoder: Encoder, texts: list[str]) -> tuple[list[list[int]], int]:
    """Ids of each document, and the number of pieces."""
    documents: list[list[int]] = [[]]
    pieces = list(encoder.pieces(texts))
    for ids, last in pieces:
        documents[-1] += ids.tolist()
        if last:
            documents.append([])
    assert documents.pop() == []
    return documents, len(pieces)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_pieces_have_the_ids_of_the_whole(
    make: Callable[[str, Path], Any], prose: str, tokenizer_dir: Path
) -> None:
    tokenizer = make(prose, tokenizer_dir)
    whole = tokenizer(prose, add_special_tokens=False)["input_ids"]
    for piece, overlap in ((50_000, 4096), (20_011, 2048), (7919, 1024), (4999, 500)):
        with Encoder(tokenizer, piece=piece, overlap=overlap) as encoder:
            assert encoder._child is not None
            (found,), pieces = encoded(encoder, [prose])
        assert np.array_equal(found, whole), piece
        assert pieces > len(prose) // piece * 0.8, "it was cut"


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_pieces_of_megabytes_have_the_ids_of_the_whole(
    make: Callable[[str, Path], Any], prose: str, tokenizer_dir: Path
) -> None:
    tokenizer, text = make(prose, tokenizer_dir), prose * 10
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for piece, overlap in ((tokenizing.PIECE, tokenizing.OVERLAP), (100_003, 4096), (9973, 1000)):
        with Encoder(tokenizer, piece=piece, overlap=overlap) as encoder:
            (found,), pieces = encoded(encoder, [text])
        assert np.array_equal(found, whole), piece
        assert pieces > len(text) // piece * 0.8, "it was cut"


def test_short_documents_come_with_long_ones_in_order(prose: str, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    texts = ["if", "", prose[:9000], "\n", prose[:3], prose[9000:20_000], "", "while"]
    with Encoder(tokenizer, piece=4000, overlap=400) as encoder:
        found, _ = encoded(encoder, texts)
    assert found == tokenizer(texts, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["x" * 60_000, "\n" * 60_000, "12" * 30_000, "ab-" * 20_000])
def test_a_run_without_a_place_to_cut_is_one_piece(text: str, tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    with Encoder(tokenizer, piece=4000, overlap=400) as encoder:
        (found,), _ = encoded(encoder, [f"if {text} or {text}"])
    whole = tokenizer(f"if {text} or {text}", add_special_tokens=False)["input_ids"]
    assert found == whole


def test_a_longer_run_is_refused(
    prose: str, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "LARGEST", 50_000)
    text = prose[:20_000] + "x" * 100_000
    with (
        Encoder(load_tokenizer(str(tokenizer_dir)), piece=4000, overlap=400) as encoder,
        pytest.raises(DataError, match="120000 characters .* no place to cut it at from charac"),
    ):
        encoded(encoder, [text])


def test_a_pattern_that_may_reach_anywhere_is_not_cut(
    prose: str, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A match that ends at the last mark of a document, far from where it begins."""
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"#.*#|\w+|\W"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = wrapped(backend)
    plain = prose.replace("#", "").replace("\n", " ").replace("\r", " ")
    text = f"{plain[:9000]}#{plain[9000:19_000]}#{plain[:500]}"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    with Encoder(tokenizer, piece=4000, overlap=400) as encoder:
        (found,), pieces = encoded(encoder, [text])
        assert (found, pieces) == (whole, 1)
        monkeypatch.setattr(tokenizing, "LARGEST", 8000)
        with pytest.raises(DataError, match="shows no place to cut it"):
            encoded(encoder, [text])


def with_pattern(directory: Path, tokenizer_dir: Path, pattern: str) -> Any:
    described = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            described["pre_tokenizer"],
        ],
    }
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(described))
    settings = (tokenizer_dir / "tokenizer_config.json").read_text()
    (directory / "tokenizer_config.json").write_text(settings)
    return load_tokenizer(str(directory))


def test_a_pattern_that_never_ends_on_the_text_is_one_line(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "SECONDS", 1)
    tokenizer = with_pattern(tmp_path / "slow", tokenizer_dir, "(?:qz|q|z|qq)+$")
    with Encoder(tokenizer) as encoder, pytest.raises(DataError, match="tokenized with the tok"):
        encoded(encoder, ["qz" * 20_000 + "!"])
