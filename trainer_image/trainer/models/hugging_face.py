"""Models by directory or by name on the Hugging Face hub, and their tokenizers."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.models.local_files import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_FILES,
    check_sizes,
    check_tokenizer,
)
from trainer.models.pretrained import Located, Needed, Pretrained, described
from trainer.models.remote_models import fetch_model
from trainer.runtime.errors import ModelError, UsageError
from trainer.storage.files import check_files, in_home, os_errors, status_of
from trainer.storage.places import is_remote

_SHOWN = 1000
"""Characters of a library's reason."""


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: names on the hub are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def locate(model: str | Pretrained, needed: Needed, what: str = "teacher") -> Located:
    """Where `transformers` finds a model; one in an object store is fetched.

    Args:
        model: by hub name, local directory or ``gs://`` directory.
        needed: what of it, see `trainer.models.remote_models.fetch_model`.
        what: what messages call it: teacher, student.

    Raises:
        ModelError: a path that is no directory, which `transformers` would look for on the hub; or
            what is in an object store is refused, see `trainer.models.remote_models.fetch_model`.
        StorageError: the directory cannot be read or fetched, or holds a pipe, a socket or a
            device.
        UsageError: there is no such home directory, or a revision of a local directory is asked
            for.
    """
    model = Pretrained.of(model)
    name, shown = model.name, described(needed, what)
    if is_remote(name):
        fetched, digest = fetch_model(model, needed, what)
        return Located(str(fetched), None, replace(model, revision=digest))
    path = in_home(name)
    with os_errors("reading", path):
        found = status_of(path)
    if found is None:
        if looks_local(name):
            raise ModelError(f"{shown} {name!r} cannot be loaded: no such directory")
        return Located(name, model.revision, model)
    if not stat.S_ISDIR(found.st_mode):
        raise ModelError(
            f"{shown} {name!r} cannot be loaded: it is a file; give the directory that holds it"
        )
    if model.revision is not None:
        raise UsageError(
            f"--teacher_revision={model.revision}: {name!r} is a local directory, which has no"
            " revisions; leave it out"
        )
    with os_errors("reading", path):
        # `transformers` would wait at a pipe, and read a device for ever
        check_files(*Path(path).iterdir())
    return Located(path, None, model)


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
        here = is_remote(name) or os.path.isdir(in_home(name))
        hint = "" if here else "; check the name, the token and the network"
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


def _fetched(what: str, located: Located, file: str, token: str | None) -> str | None:
    """The local copy of a model's files on the hub, with one of them; None where it has none."""
    from transformers.utils import cached_file

    with readable_errors(what, located.path):
        path = cached_file(
            located.path,
            file,
            token=token,
            _raise_exceptions_for_missing_entries=False,
            **located.options,
        )
    return None if path is None else os.path.dirname(path)


def commit_of(located: Located, token: str | None = None) -> str | None:
    """The commit that a model of the hub is at; None where the hub's cache does not tell.

    Raises:
        ModelError: the model's configuration cannot be loaded.
    """
    # The cache of the hub has a directory for each commit
    commit = os.path.basename(_fetched("teacher", located, CONFIG, token) or "")
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def load_tokenizer(model: str | Pretrained, token: str | None = None) -> Any:
    """The tokenizer of a model.

    Raises:
        ModelError: there is none, it cannot be loaded, or it lacks a vocabulary or the end-of-text
            token that goes between documents.
        StorageError: its directory cannot be read or fetched.
    """
    from transformers import AutoTokenizer

    located = locate(model, "tokenizer")
    name, location = located.model.name, located.path
    if os.path.isdir(location) and not any(map(TOKENIZER_FILES.fullmatch, os.listdir(location))):
        # For some models, `transformers` would then make an empty tokenizer
        raise ModelError(
            f"{name!r} has no tokenizer files (tokenizer.json, for example); save the teacher's"
            " tokenizer there"
        )
    local = os.path.isdir(location)
    directory = location if local else _fetched("tokenizer of", located, TOKENIZER, token)
    if directory is not None:
        check_sizes("tokenizer of", name, directory)
        check_tokenizer(name, directory)
    with readable_errors("tokenizer of", name):
        tokenizer = AutoTokenizer.from_pretrained(
            location, token=token, trust_remote_code=False, **located.options
        )
    added = getattr(tokenizer, "added_tokens_decoder", {})
    if len(tokenizer.get_vocab()) - len(added) < 2:
        raise ModelError(
            f"tokenizer of {name!r} has an empty vocabulary; a file of it is missing or damaged"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer of {name!r} has no EOS token; documents are joined by it")
    return tokenizer
