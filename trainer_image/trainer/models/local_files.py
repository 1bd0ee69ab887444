"""A model's local files, looked at before the libraries read them."""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from trainer.runtime.bounded import MEMORY, BoundedError, BoundedProcess
from trainer.runtime.errors import CheckpointError, ModelError
from trainer.runtime.messages import brief
from trainer.storage.base import StorageMissingError
from trainer.storage.files import open_regular, os_errors, read_regular

CONFIG, TOKENIZER = "config.json", "tokenizer.json"

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Suffixes of files that may be pickles."""

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
    """Refuse files that no model has of such a size; `locate` refuses what is no file.

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
        check_size(what, name, path.name, status.st_size)


def check_size(what: str, name: str, file: str, size: int) -> None:
    """Refuse a file of a model that no model has of such a size.

    Raises:
        ModelError: naming the file.
    """
    text = file.endswith((".json", ".jinja", ".txt")) and file != TOKENIZER
    largest = _LARGEST_JSON if text else _LARGEST_TOKENIZER
    if (text or TOKENIZER_FILES.fullmatch(file)) and size > largest:
        raise ModelError(
            f"{what} {name!r} cannot be loaded: {file} has {size} bytes; at most {largest} are"
            " expected"
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
    for name in weight_files(what, Path(directory)):
        # What may not be read, safetensors calls missing
        with os_errors("reading", Path(directory, name)), open_regular(Path(directory, name)):
            pass
        if name.endswith(PICKLES):
            _check_pickled(what, Path(directory, name))
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


def read_config(what: str, directory: Path, file: str = CONFIG) -> dict[str, Any]:
    """A JSON object of a model's directory; empty where there is no such file.

    Raises:
        ModelError: it is something else than a JSON object.
        StorageError: it cannot be read.
    """
    path = directory / file
    try:
        with os_errors("reading", path):
            content = json.loads(read_regular(path, limit=_LARGEST_JSON))
    except StorageMissingError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what} cannot be loaded: {file}: {brief(str(error))}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{what} cannot be loaded: {file} is no JSON object")
    return content


def weight_files(what: str, directory: Path, beside: Collection[str] | None = None) -> list[str]:
    """Names of the files that `transformers` takes for the weights; none where there are none.

    Args:
        what: what messages call the model, ``teacher 'gpt2'``.
        directory: with its configuration and, if it has one, the index of its weights.
        beside: the files of the model; by default those of the directory.

    Raises:
        ModelError: the configuration names a pickle, or the index a file that is not there.
    """
    beside = {path.name for path in directory.iterdir()} if beside is None else beside
    stated = read_config(what, directory).get("transformers_weights")
    if stated is not None:
        if not str(stated).endswith((".safetensors", _INDEX)):
            raise ModelError(
                f"{what} cannot be loaded: its config.json names weights in"
                f" {brief(stated)}; give safetensors"
            )
        if not str(stated).endswith(_INDEX):
            return [_beside(what, str(stated), CONFIG, beside)]
        return _indexed(what, directory, str(stated), beside)
    for single in ("model.safetensors", "pytorch_model.bin"):
        if single in beside:
            return [single]
        if f"{single}.index.json" in beside:
            return _indexed(what, directory, f"{single}.index.json", beside)
    return []


def _indexed(what: str, directory: Path, index: str, beside: Collection[str]) -> list[str]:
    content = read_config(what, directory, _beside(what, index, CONFIG, beside))
    files = content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise ModelError(f"{what} cannot be loaded: {index} has no weight_map from names to files")
    return [_beside(what, file, index, beside) for file in sorted(set(files.values()))]


def _beside(what: str, file: str, naming: str, beside: Collection[str]) -> str:
    """The file itself, if it is one of those beside the file that names it."""
    if os.path.basename(file) != file or file not in beside:
        raise ModelError(
            f"{what} cannot be loaded: {naming} names {file[:200]!r}, and no such file is beside it"
        )
    return file


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
