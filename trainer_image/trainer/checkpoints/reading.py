"""Reading checkpoints without trusting them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.fields import check_meta, check_trainer_state, is_name, plain, short
from trainer.checkpoints.metadata import current_form
from trainer.checkpoints.tensor_checks import check_weights
from trainer.runtime.archives import check_archive, first_line, is_out_of_memory, load_archive
from trainer.runtime.errors import CheckpointError, StorageError
from trainer.storage.base import StorageMissingError
from trainer.storage.files import open_regular, os_errors


@contextmanager
def open_checkpoint(path: Path, source: str) -> Iterator[BinaryIO]:
    """A checkpoint's file, opened once for all that looks at it.

    What another job puts under its name meanwhile is another file.

    Args:
        path: the file.
        source: what messages call it.

    Raises:
        StorageError: it does not exist, is something else than a file, or cannot be read.
    """
    with os_errors("reading", source):
        file = open_regular(path)
    with file:
        yield file


def read_checkpoint(path: Path, source: str | None = None) -> Checkpoint:
    """Read a checkpoint file without running any code it may carry.

    Raises:
        CheckpointError: it does not exist, or as `read_open_checkpoint` does.
        StorageError: as that and `open_checkpoint` do.
    """
    source = source or str(path)
    try:
        with open_checkpoint(path, source) as file:
            return read_open_checkpoint(file, source)
    except StorageMissingError:
        raise CheckpointError(f"{source} does not exist") from None


def read_open_checkpoint(file: BinaryIO, source: str) -> Checkpoint:
    """The checkpoint of an open file; runs no code that it may carry.

    Args:
        file: of `open_checkpoint`.
        source: what messages call it.

    Raises:
        CheckpointError: it is truncated, not a checkpoint, carries code, claims more memory than
            it has bytes, or holds weights that are not finite.
        StorageError: this machine cannot read it, or has too little memory for it.
    """
    try:
        with os_errors("reading", source):
            size = os.fstat(file.fileno()).st_size
            check_archive(file, source)
            return _interpret(load_archive(file, source), source, size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise StorageError(
            f"reading {source!r} failed: out of memory{first_line(error, ' ({})')}; stop what else"
            " takes memory on this machine, or take one with more"
        ) from None


def _interpret(payload: Any, source: str, size: int) -> Checkpoint:
    """Tell our layout, the base package's and a bare state dict apart, and check the types."""
    if not isinstance(payload, dict) or not payload:
        raise CheckpointError(f"{source} holds a {type(payload).__name__}, not a checkpoint's dict")
    meta = payload.get("meta")
    if isinstance(meta, dict):
        meta = current_form(meta, source)  # a newer format may differ in all that follows
    bare = all(isinstance(value, Tensor) for value in payload.values())
    weights = payload if bare else payload.get("model")
    if not isinstance(weights, dict) or not all(
        is_name(name) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise CheckpointError(f"{source} has no 'model' with named tensors")
    check_weights(weights, source, size)
    if bare:
        return Checkpoint(source, dict(weights))
    step, state = payload.get("step", 0), payload.get("trainer_state")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{source} has step {short(step)}, which is not a number of updates")
    optimizer = payload.get("optimizer")
    for name, value in (("meta", meta), ("trainer_state", state), ("optimizer", optimizer)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{source} has a {name} that is a {type(value).__name__}")
    check_trainer_state(state or {}, step, source)
    meta = plain(meta or {}, source)
    if meta.get("step", step) != step:
        raise CheckpointError(
            f"{source} contradicts itself: step {step}, in its metadata {short(meta['step'])}"
        )
    check_meta(meta, step, source)
    return Checkpoint(source, dict(weights), optimizer, step, dict(state or {}), meta)
