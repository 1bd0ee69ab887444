"""Reading checkpoints without trusting them."""

from __future__ import annotations

import errno
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.fields import check_meta, check_trainer_state, is_name, plain, short
from trainer.checkpoints.metadata import current_form
from trainer.checkpoints.pickles import PICKLE_LIMIT, check_pickle
from trainer.checkpoints.tensor_checks import check_weights
from trainer.runtime.errors import CheckpointError, StorageError
from trainer.storage.base import StorageMissingError
from trainer.storage.files import open_regular, os_errors

_DIRECTORY_LIMIT = 16 << 20
"""Bytes of an archive's directory; a record takes about 100."""


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
            file.seek(0)
            _check_archive(file, size, source)
            file.seek(0)
            return _interpret(_load(file, source), source, size)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise StorageError(
            f"reading {source!r} failed: out of memory{_first_line(error, ' ({})')}; stop what else"
            " takes memory on this machine, or take one with more"
        ) from None


def _load(file: BinaryIO, source: str) -> Any:
    try:
        # An open file: torch takes a path that ends in .safetensors for another format
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it refers to {detail[1]}" if detail else "it holds more than tensors and numbers"
        raise CheckpointError(f"{source} is refused: {what}, which could run code") from None
    except Exception as error:  # a damaged pickle can raise anything
        if _is_out_of_memory(error) or _is_machine_fault(error):
            raise
        first = _first_line(error) or type(error).__name__
        raise CheckpointError(f"{source} cannot be read as a checkpoint: {first}") from None


def _first_line(error: Exception, form: str = "{}") -> str:
    """A message's first line, formatted with ``form``; empty for an empty message."""
    lines = str(error).strip().splitlines()
    return form.format(lines[0][:200]) if lines else ""


def _is_out_of_memory(error: Exception) -> bool:
    # torch's allocator for the CPU raises a plain RuntimeError
    signs = ("DefaultCPUAllocator", "can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _is_machine_fault(error: Exception) -> bool:
    # EINVAL is damage: seeking to an offset before the file's start
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def _check_archive(file: BinaryIO, size: int, source: str) -> None:
    """Refuse what unpacks to more than it holds, and a pickle that `torch.save` did not write."""
    length = _directory_length(file, size, source)
    if length > _DIRECTORY_LIMIT:
        raise CheckpointError(f"{source} is refused: its directory has {length} bytes")
    try:
        with zipfile.ZipFile(file) as archive:
            records = _records(archive, size, source)
            if records.get("data.pkl", 0) > PICKLE_LIMIT:
                raise CheckpointError(
                    f"{source} is refused: what it holds beside its tensors is larger than any"
                    f" run's: {records['data.pkl']} bytes"
                )
            program = archive.read(_prefix(archive) + "data.pkl")
    except CheckpointError:
        raise
    except KeyError:
        raise CheckpointError(f"{source} is not a checkpoint of torch.save: no data.pkl") from None
    except Exception as error:  # a damaged directory can raise anything
        if _is_out_of_memory(error) or _is_machine_fault(error):
            raise
        raise _not_a_checkpoint(source, _first_line(error)) from None
    check_pickle(program, records, source)


def _not_a_checkpoint(source: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is not a checkpoint of torch.save, or it was cut short: {reason}"
    )


def _prefix(archive: zipfile.ZipFile) -> str:
    """The archive's own directory, in which `torch.save` puts every record."""
    return archive.infolist()[0].filename.partition("/")[0] + "/"


def _records(archive: zipfile.ZipFile, size: int, source: str) -> dict[str, int]:
    """Name and bytes of every record, without the archive's own directory."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{source} is refused: it is a compressed archive, torch.save's are not"
        )
    unpacked = sum(max(entry.file_size, entry.compress_size) for entry in entries)
    if unpacked > size:
        raise CheckpointError(
            f"{source} is refused: it claims {unpacked} bytes of content in {size} bytes of file"
        )
    # torch looks names up regardless of case
    names = {entry.filename.lower() for entry in entries}
    alike = all(entry.filename.startswith(_prefix(archive)) for entry in entries)
    same = all(entry.file_size == entry.compress_size for entry in entries)
    if not alike or not same or len(names) < len(entries):
        raise CheckpointError(
            f"{source} is refused: its records contradict each other, torch.save's do not"
        )
    return {entry.filename.partition("/")[2]: entry.file_size for entry in entries}


def _directory_length(file: BinaryIO, size: int, source: str) -> int:
    """The bytes of the archive's directory, right before its end records, which point to it.

    Python looks for it right before them and torch where they point, so a file could hold two.
    Layout: APPNOTE.TXT 4.3.14 to 4.3.16, with no comment.

    Raises:
        CheckpointError: it is not there, or the file does not begin as an archive does; torch
            would take that for another format.
    """

    def number(data: bytes, at: int, length: int) -> int:
        return int.from_bytes(data[at : at + length], "little")

    begins = file.read(4) == b"PK\x03\x04"
    end = size - 22
    file.seek(max(0, end - 20))
    tail = file.read(42)
    locator, record = tail[:-22], tail[-22:]
    if not begins or record[:4] != b"PK\x05\x06":
        raise _not_a_checkpoint(source, "File is not a zip file")
    length, start = number(record, 12, 4), number(record, 16, 4)
    pointed = True
    if locator[:4] == b"PK\x06\x07":
        end -= 20 + 56
        file.seek(max(0, end))
        large = file.read(56)
        pointed = number(locator, 8, 8) == end and large[:4] == b"PK\x06\x06"
        length, start = number(large, 40, 8), number(large, 48, 8)
    if not pointed or start + length != end:
        raise CheckpointError(
            f"{source} is refused: its directory is not where its end says, torch.save's is"
        )
    return length


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
