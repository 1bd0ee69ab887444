"""A model's local files, looked at before the libraries read them."""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from trainer.runtime.bounded import MEMORY, BoundedError, BoundedProcess
from trainer.runtime.errors import CheckpointError, ModelError
from trainer.runtime.messages import brief
from trainer.storage.files import open_regular, os_errors

TOKENIZER = "tokenizer.json"

TOKENIZER_FILES = re.compile(
    r"(tokenizer|vocab|merges|spiece|sentencepiece|bpe|tekken).*|.*\.(model|tiktoken|spm|bpe|vocab)"
)

_LARGEST_TOKENIZER = 256 << 20
"""Bytes."""
_LARGEST_JSON = 32 << 20
"""Bytes; what Python makes of it may take twenty times as many."""

_MEMORY_PER_BYTE = 16
"""Of a tokenizer's file."""

_MOST = {"num_hidden_layers": 2000, "num_experts": 4096, "num_local_experts": 4096}
"""More than any model has; each is a module that takes its time to make."""

_INDEX = ".safetensors.index.json"

_QUANTIZED = 8
"""Parameters to a byte of weights that are quantized."""
_SLACK = 1 << 20
"""Parameters that are none of the stored ones, such as constant buffers."""

_PROBE = "".join(
    (
        "The quick brown fox, 1234567 times: (x + y) == z;\n\n",
        "\tdef f(a):\r\n    return 'naïve — 東京'\n",
        *(piece * 64 for piece in ("a", " ", "\n", "1", "!", "aA1_ ", "é", "ab")),
        "?\0",
    )
)


def check_sizes(what: str, name: str, directory: str) -> None:
    """Refuse files that no model has of such a size; `location_of` refuses what is no file.

    Raises:
        ModelError: naming the file.
    """
    for path in sorted(Path(directory).iterdir()):
        try:
            status = path.stat()
        except OSError:
            continue  # what links to nothing is missing, and told as that where it is needed
        if stat.S_ISDIR(status.st_mode):
            continue
        text = path.suffix in (".json", ".jinja", ".txt") and path.name != TOKENIZER
        largest = _LARGEST_JSON if text else _LARGEST_TOKENIZER
        expected = text or TOKENIZER_FILES.fullmatch(path.name)
        if expected and status.st_size > largest:
            raise ModelError(
                f"{what} {name!r} cannot be loaded: {path.name} has {status.st_size} bytes; at"
                f" most {largest} are expected"
            )


def check_tokenizer(name: str, directory: str) -> None:
    """Let a child process load the tokenizer and encode a few texts, once for each file.

    Raises:
        ModelError: that takes too much, or crashes.
    """
    path = Path(directory, TOKENIZER)
    if path.is_file():
        status = path.stat()
        _check_tokenizer(name, str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _check_tokenizer(name: str, path: str, size: int, changed: int) -> None:
    try:
        with BoundedProcess(f"{__name__}:answer", memory=MEMORY + _MEMORY_PER_BYTE * size) as child:
            child.ask(os.fsencode(path))
    except BoundedError as error:
        raise ModelError(f"tokenizer of {name!r} cannot be loaded: {TOKENIZER}: {error}") from None


def answer(request: bytes) -> bytes:
    """Load the tokenizer of a path and encode with it, in the child; the answer is empty."""
    from tokenizers import Tokenizer

    Tokenizer.from_file(os.fsdecode(request)).encode(_PROBE)
    return b""


def check_weights(what: str, directory: str, config: Any) -> None:
    """Refuse a configuration of a far larger model than the weights beside it are of.

    Weights that are pickles are walked through, as those of checkpoints are.

    Args:
        what: what messages call the model, ``teacher 'gpt2'``.
        directory: where it lies.
        config: its configuration.

    Raises:
        ModelError: naming what is out of proportion, a file that the index of the weights names
            and that is not there, or a pickle that holds more than tensors.
        StorageError: the weights cannot be read.
    """
    for file in _weights(what, Path(directory), config):
        if file.suffix != ".safetensors":
            _check_pickled(what, file)
    text = config.get_text_config()
    for key, most in _MOST.items():
        value = getattr(text, key, None)
        if isinstance(value, int) and value > most:
            raise ModelError(
                f"{what} cannot be loaded: its config.json has {key} {value}; at most"
                f" {most} are supported"
            )
    stored = sum(
        path.stat().st_size
        for path in Path(directory).iterdir()
        if path.suffix in (".safetensors", ".bin") and path.is_file()
    )
    quantized = getattr(config, "quantization_config", None) is not None
    described = _parameters(config)
    if described > stored * (_QUANTIZED if quantized else 1) + _SLACK:
        raise ModelError(
            f"{what} cannot be loaded: its config.json describes {described} parameters,"
            f" but its weights have {stored} bytes; they are of different models"
        )


def _parameters(config: Any) -> int:
    """How many parameters and constants a model has, without the memory for any."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.models.uninitialized import Uninitialized

    with torch.device("meta"), Uninitialized():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


def _weights(what: str, directory: Path, config: Any) -> list[Path]:
    """The files that `transformers` takes for the weights; none where there are none."""
    stated = getattr(config, "transformers_weights", None)
    if stated is not None:
        if not str(stated).endswith((".safetensors", _INDEX)):
            raise ModelError(
                f"{what} cannot be loaded: its config.json names weights in"
                f" {brief(stated)}; give safetensors"
            )
        index = str(stated).endswith(_INDEX)
        return _indexed(what, directory, str(stated)) if index else [directory / str(stated)]
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / f"{single}.index.json").is_file():
            return _indexed(what, directory, f"{single}.index.json")
    return []


def _indexed(what: str, directory: Path, index: str) -> list[Path]:
    content = json.loads((directory / index).read_bytes())
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise ModelError(f"{what} cannot be loaded: {index} has no weight_map from names to files")
    for file in sorted(set(files.values())):
        if os.path.basename(file) != file or not (directory / file).is_file():
            raise ModelError(
                f"{what} cannot be loaded: {index} names {file[:200]!r}, and no such"
                " file is beside it"
            )
    return [directory / file for file in sorted(set(files.values()))]


def _check_pickled(what: str, path: Path) -> None:
    # It needs torch, which the child process that loads tokenizers does without
    from trainer.runtime.archives import check_archive

    try:
        with os_errors("reading", path), open_regular(path) as file:
            check_archive(file, path.name)
    except CheckpointError as error:
        raise ModelError(
            f"{what} cannot be loaded: {error}; save its weights anew, as safetensors"
        ) from None
