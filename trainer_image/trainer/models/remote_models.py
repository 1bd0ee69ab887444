"""Models in an object store: what of a directory is needed, and what of it is refused.

Only what describes a model, its tokenizer and its weights as safetensors are fetched. The weights
stay where they are until they are asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.models.local_files import (
    CONFIG,
    PICKLES,
    TOKENIZER_FILES,
    check_size,
    read_config,
    weight_files,
)
from trainer.models.pretrained import Needed, Pretrained, described
from trainer.runtime.errors import ModelError
from trainer.storage.copies import Listing, check_revision, list_files, local_copy

_DESCRIBING = (".json", ".jinja", ".txt")

_WEIGHTS = ".safetensors"

_MOST_FILES = 20_000
"""Below the directory of a model, optimizer states and checkpoints of its training included."""


def fetch_model(model: Pretrained, needed: Needed, what: str) -> tuple[Path, str]:
    """Files of a model as a directory of this machine, and the digest that tells its version.

    Args:
        model: in an object store.
        needed: the weights are fetched only where they are.
        what: what messages call it: teacher, student.

    Raises:
        ModelError: it has code of its own; or its configuration or safetensors are needed and
            missing, or some that their index names.
        StorageError: it cannot be listed or fetched, or is not of the revision asked for.
    """
    name, shown = model.name, described(needed, what)
    listing = _listing(model)
    small = listing.only(file for file in listing.names if not file.endswith(_WEIGHTS))
    for entry in small.entries:
        check_size(shown, name, entry.name, entry.size)
    if needed != "tokenizer":
        _check_parts(f"{what} {name!r}", listing)
    directory = local_copy(small, model.cache_dir)
    _check_no_code(f"{shown} {name!r}", directory)
    if needed != "tokenizer":
        # Before anything large is fetched: shards that are missing are told now
        weights = weight_files(f"{what} {name!r}", directory, beside=listing.names)
        if needed == "weights":
            directory = local_copy(listing.only({*small.names, *weights}), model.cache_dir)
    return directory, listing.digest


def revision_of(model: Pretrained) -> str:
    """The digest that tells a teacher's version, by its listing alone.

    Raises:
        ModelError: it has no configuration or no safetensors.
        StorageError: it cannot be listed.
    """
    listing = _listing(model)
    _check_parts(f"teacher {model.name!r}", listing)
    return listing.digest


def _listing(model: Pretrained) -> Listing:
    listing = list_files(model.name, _is_needed, most=_MOST_FILES)
    check_revision(listing, model.name, model.revision, "teacher_revision")
    return listing


def _is_needed(name: str) -> bool:
    if "/" in name or name.endswith(PICKLES):
        return False
    return name.endswith((*_DESCRIBING, _WEIGHTS)) or bool(TOKENIZER_FILES.fullmatch(name))


def _check_parts(what: str, listing: Listing) -> None:
    def refused(reason: str) -> ModelError:
        return ModelError(f"{what} cannot be loaded: {reason}")

    if CONFIG not in listing.names:
        raise refused(f"it has no {CONFIG}; give the directory of a Hugging Face model")
    if not any(file.endswith(_WEIGHTS) for file in listing.names):
        raise refused(
            "it has no weights as safetensors, and a pickle such as pytorch_model.bin is not"
            " loaded, because it may run code; save the model anew with save_pretrained"
        )


def _check_no_code(what: str, directory: Path) -> None:
    """Refuse what names code beside it, even where a library has a class of its own for it."""
    for file in (CONFIG, "tokenizer_config.json"):
        content: Any = read_config(what, directory, file)
        if content.get("auto_map"):
            raise ModelError(
                f"{what} cannot be loaded: its {file} asks for code of its own"
                " (auto_map), and remote code is not run; give one that needs none"
            )
