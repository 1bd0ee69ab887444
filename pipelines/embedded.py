"""A real corpus and teacher that need no network: English that every Python installation carries.

The corpus is CPython's language reference (`pydoc_data.topics`) and the docstrings of the installed
packages. The teacher is a small GPT-2 with its own byte-level BPE tokenizer, trained on it once by
this project's own trainer and saved in Hugging Face format.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from trainer import entrypoint, export_hf
from trainer.runtime.log import log

CORPUS_BYTES = 600_000
VALIDATION_SHARE = 0.03
_SHORTEST = 200
"""Characters; a shorter docstring is a phrase, not a text."""

VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
TEACHER_FLAGS = {
    "block_size": 128,
    "d_model": 160,
    "n_layers": 4,
    "n_heads": 5,
    "alpha": 0.0,
    "train_steps": 350,
    "micro_batch": 16,
    "global_batch": 16,
    "lr_peak": 3e-3,
    "warmup_steps": 30,
    "weight_decay": 0.05,
    "eval_every": 350,
    "save_every": 1000,
    "log_interval": 25,
    "seed": 1,
}
"""The teacher's own training: cross entropy only."""


def english_documents() -> Iterator[str]:
    """Reference topics, then docstrings, in an order that the machine does not change."""
    from pydoc_data.topics import topics

    for _, text in sorted(topics.items()):
        yield text
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    for root in (library, packages):
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root).parts
            if root == library and relative[0] in ("site-packages", "test", "idlelib"):
                continue
            if "tests" not in relative:
                yield from docstrings(path)


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a source file that are long enough to be texts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text


def build_corpus(directory: Path, *, limit: int = CORPUS_BYTES) -> Path:
    """Write ``train.jsonl`` and ``validation.jsonl`` with distinct documents; kept once written.

    Args:
        directory: where to; made if it is missing.
        limit: bytes of text in all.
    """
    if (directory / "train.jsonl").exists():
        return directory
    log.info(
        "building a corpus of %.1f MB from the installed Python's own documentation", limit / 1e6
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".corpus-", dir=directory.parent))
    seen: set[bytes] = set()
    written = 0
    with (
        (scratch / "train.jsonl").open("w", encoding="utf-8") as train,
        (scratch / "validation.jsonl").open("w", encoding="utf-8") as validation,
    ):
        for text in english_documents():
            digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
            if digest in seen:
                continue
            seen.add(digest)
            held_out = digest[0] < VALIDATION_SHARE * 256
            (validation if held_out else train).write(json.dumps({"text": text}) + "\n")
            written += len(text)
            if written >= limit:
                break
    shutil.rmtree(directory, ignore_errors=True)
    scratch.chmod(0o755)
    scratch.rename(directory)
    return directory


def build_tokenizer(corpus: Path, directory: Path, *, vocab_size: int = VOCAB_SIZE) -> Path:
    """Train a byte-level BPE tokenizer on the corpus and save it in Hugging Face format."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    with (corpus / "train.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(str(directory))
    return directory


def build_teacher(directory: Path, corpus: Path, *, workdir: Path) -> Path:
    """Train the teacher once and save it as a stock GPT-2 with its tokenizer.

    Args:
        directory: where to; a teacher that is there already is kept.
        corpus: a directory of `build_corpus`.
        workdir: for the training run, which goes on from its snapshots when started again.
    """
    if (directory / "config.json").exists():
        log.info("teacher kept from before: %s", directory)
        return directory
    log.info("training a small teacher on the corpus, once")
    tokenizer = build_tokenizer(corpus, workdir / "tokenizer")
    flags = {
        "teacher_name": str(tokenizer),
        "dataset_name": str(corpus),
        "local_workdir": str(workdir / "run"),
        "cache_dir": str(workdir / "cache"),
        **TEACHER_FLAGS,
    }
    entrypoint.main([f"--{name}={value}" for name, value in flags.items()])
    export_hf.run(str(workdir / "run" / "best.pt"), str(directory), tokenizer=str(tokenizer))
    shutil.rmtree(workdir)
    return directory
