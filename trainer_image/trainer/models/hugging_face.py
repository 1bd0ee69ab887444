"""Models by directory or by name on the Hugging Face hub, and their tokenizers."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.models.local_files import TOKENIZER, TOKENIZER_FILES, check_sizes, check_tokenizer
from trainer.runtime.errors import ModelError
from trainer.storage.files import check_files, in_home, os_errors

_SHOWN = 1000
"""Characters of a library's reason."""


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: names on the hub are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def bucket_advice(name: str) -> str:
    """The end of an error message: what to give in place of a ``gs://`` URI; else empty.

    Vertex AI mounts the project's buckets:
    https://cloud.google.com/vertex-ai/docs/training/cloud-storage-file-system
    """
    scheme, _, path = name.partition("://")
    if scheme != "gs":
        return ""
    return f"; give a local copy, or on Vertex AI /gcs/{path}, where it mounts the bucket"


def location_of(what: str, name: str) -> str:
    """The name for `transformers`: of a directory with ``~`` expanded, of the hub as it is.

    Raises:
        ModelError: a path that is no directory; `transformers` would look for it on the hub.
        StorageError: the directory holds a pipe, a socket or a device.
        UsageError: there is no such home directory.
    """
    path = in_home(name)
    if os.path.isdir(path):
        with os_errors("reading", path):
            # `transformers` would wait at a pipe, and read a device for ever
            check_files(*Path(path).iterdir())
        return path
    if os.path.exists(path):
        raise ModelError(
            f"{what} {name!r} cannot be loaded: it is a file; give the directory that holds it"
        )
    if looks_local(name):
        advice = bucket_advice(name)
        raise ModelError(f"{what} {name!r} cannot be loaded: no such directory{advice}")
    return name


@contextlib.contextmanager
def readable_errors(what: str, name: str) -> Iterator[None]:
    """Raise a `ModelError` of one line for a bad name, a bad file or no network."""
    import huggingface_hub.errors
    import safetensors

    try:
        yield
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        EOFError,
        ImportError,
        MemoryError,
        RuntimeError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
        huggingface_hub.errors.StrictDataclassError,
    ) as error:
        hint = "" if os.path.isdir(in_home(name)) else "; check the name, the token and the network"
        raise ModelError(
            f"{what} {name!r} cannot be loaded: {_reason(error)[:_SHOWN]}{hint}"
        ) from error


def _reason(error: Exception) -> str:
    """The cause in one line."""
    import huggingface_hub.errors

    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "trust_remote_code" in text:
        return "it needs code of its own, and remote code is not run; give one that needs none"
    if isinstance(error, pickle.UnpicklingError):
        function = re.search(r"GLOBAL (\S+)", text)
        what = f"refers to {function[1]}" if function else "is damaged or holds more than tensors"
        return f"a .bin file of its weights {what}, which could run code; give safetensors"
    if isinstance(error, huggingface_hub.errors.StrictDataclassError):
        # The first line names the check, the last one the cause
        return f"its config.json does not hold together: {lines[-1]}"
    if isinstance(error, KeyError):
        return f"unknown or missing key {text}"
    return lines[0] if lines else type(error).__name__


def _fetched(name: str, token: str | None) -> str | None:
    """The local copy of a model on the hub, with its tokenizer's file; None where it has none."""
    from transformers.utils import cached_file

    with readable_errors("tokenizer of", name):
        path = cached_file(
            name, TOKENIZER, token=token, _raise_exceptions_for_missing_entries=False
        )
    return None if path is None else os.path.dirname(path)


def load_tokenizer(name: str, token: str | None = None) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: there is none, it cannot be loaded, or it lacks a vocabulary or the end-of-text
            token that goes between documents.
    """
    from transformers import AutoTokenizer

    location = location_of("tokenizer of", name)
    if os.path.isdir(location) and not any(map(TOKENIZER_FILES.fullmatch, os.listdir(location))):
        # For some models, `transformers` would then make an empty tokenizer
        raise ModelError(
            f"{name!r} has no tokenizer files (tokenizer.json, for example); save the teacher's"
            " tokenizer there"
        )
    directory = location if os.path.isdir(location) else _fetched(name, token)
    if directory is not None:
        check_sizes("tokenizer of", name, directory)
        check_tokenizer(name, directory)
    with readable_errors("tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(location, token=token, trust_remote_code=False)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    if len(tokenizer.get_vocab()) - len(added) < 2:
        raise ModelError(
            f"tokenizer of {name!r} has an empty vocabulary; a file of it is missing or damaged"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer of {name!r} has no EOS token; documents are joined by it")
    return tokenizer
