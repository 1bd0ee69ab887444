"""How many tokens a data set has, as far as that is known before it is prepared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.estimates.networks import is_gpt2

_KNOWN = {
    "wikitext-103-raw-v1": (118e6, 0.25e6),
    "wikitext-2-raw-v1": (2.4e6, 0.25e6),
}
"""Of WikiText by GPT-2's tokenizer: about so many of the training and of the validation split."""
_WIKITEXT = ("wikitext", "Salesforce/wikitext")

BYTES_A_TOKEN = 4.4
"""Of English text by a tokenizer of some 50,000 entries."""
_TEXT = (".txt", ".text", ".json", ".jsonl")
_MOST_FILES = 100_000
_HELD_OUT = ("valid", "test", "dev")

TOKENS_A_CORE = 1e5
"""That one CPU core tokenizes in a second: assumed, after one look at GPT-2's tokenizer."""


@dataclass(frozen=True)
class DataSize:
    """Tokens of a data set's splits; None where they are not known."""

    train: float | None
    validation: float | None
    known: str
    """How they are known, or why they are not."""


def data_size(values: Mapping[str, Any]) -> DataSize:
    """The size of the data set that the pipeline's parameters name.

    Args:
        values: every parameter.
    """
    name, config = values["dataset_name"], values["dataset_config"]
    if name in _WIKITEXT and config in _KNOWN and is_gpt2(values["teacher_name"]):
        train, validation = _KNOWN[config]
        return DataSize(train, validation, "as published")
    path = Path(os.path.expanduser(name))
    if path.exists():
        return _local(path)
    return DataSize(None, None, f"the tokens of {name!r} are not known before it is prepared")


def _local(path: Path) -> DataSize:
    files = list(islice(path.rglob("*"), _MOST_FILES)) if path.is_dir() else [path]
    texts = [file for file in files if file.suffix in _TEXT and file.is_file()]
    if not texts or any(file.suffix == ".parquet" for file in files):
        return DataSize(None, None, f"the tokens of {str(path)!r} do not follow from its files")
    held_out = [file for file in texts if any(word in file.stem for word in _HELD_OUT)]
    train = sum(file.stat().st_size for file in texts if file not in held_out)
    validation = sum(file.stat().st_size for file in held_out)
    return DataSize(
        train / BYTES_A_TOKEN,
        validation / BYTES_A_TOKEN if held_out else None,
        f"from the size of its files, {BYTES_A_TOKEN} bytes a token",
    )
