"""Reading checkpoints without trusting them."""

from __future__ import annotations

import errno
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.metadata import are_metrics, current_form, is_number
from trainer.checkpoints.sidecar import SIDECAR_LIMIT
from trainer.checkpoints.tensor_checks import check_weights, is_held
from trainer.runtime.errors import CheckpointError, StorageError
from trainer.storage.files import os_errors


def read_checkpoint(path: Path, source: str | None = None) -> Checkpoint:
    """Read a checkpoint file without running any code it may carry.

    Raises:
        CheckpointError: it is truncated, not a checkpoint, carries code, claims more memory than
            it has bytes, or holds weights that are not finite.
        StorageError: this machine cannot read it, or has too little memory for it.
    """
    source = source or str(path)
    try:
        with os_errors("reading", source):
            _check_archive(path, source)
            return _interpret(_load(path, source), source, path.stat().st_size)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise StorageError(
            f"reading {source!r} failed: out of memory{_first_line(error, ' ({})')}; stop what else"
            " takes memory on this machine, or take one with more"
        ) from None


def _load(path: Path, source: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
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
    return form.format(lines[0]) if lines else ""


def _is_out_of_memory(error: Exception) -> bool:
    # torch's allocator for the CPU raises a plain RuntimeError
    signs = ("DefaultCPUAllocator", "can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _is_machine_fault(error: Exception) -> bool:
    # EINVAL is damage: seeking to an offset before the file's start
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def _check_archive(path: Path, source: str) -> None:
    """Refuse archives that unpack to more than they hold before anything is unpacked."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        with open(path, "rb") as file:
            plain = _has_one_directory(file, size)
    except FileNotFoundError:
        raise CheckpointError(f"{source} does not exist") from None
    except Exception as error:  # a damaged directory can raise anything
        if _is_out_of_memory(error) or _is_machine_fault(error):
            raise
        raise CheckpointError(
            f"{source} is not a checkpoint of torch.save, or it was cut short: {error}"
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{source} is refused: it is a compressed archive, torch.save's are not"
        )
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size:
        raise CheckpointError(
            f"{source} is refused: it claims {unpacked} bytes of content in {size} bytes of file"
        )
    if not plain:
        raise CheckpointError(
            f"{source} is refused: its directory is not where its end says, torch.save's is"
        )


def _has_one_directory(file: BinaryIO, size: int) -> bool:
    """Whether the archive's directory lies right before its end records, and these point to it.

    Python looks for it right before them and torch where they point, so a file could hold two.
    Layout: APPNOTE.TXT 4.3.14 to 4.3.16, with no comment.
    """

    def number(data: bytes, at: int, length: int) -> int:
        return int.from_bytes(data[at : at + length], "little")

    end = size - 22
    file.seek(max(0, end - 20))
    tail = file.read()
    locator, record = tail[:-22], tail[-22:]
    if record[:4] != b"PK\x05\x06":
        return False
    length, start = number(record, 12, 4), number(record, 16, 4)
    if locator[:4] == b"PK\x06\x07":
        end -= 20 + 56
        file.seek(end)
        large = file.read(56)
        if number(locator, 8, 8) != end or large[:4] != b"PK\x06\x06":
            return False
        length, start = number(large, 40, 8), number(large, 48, 8)
    return start + length == end


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
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise CheckpointError(f"{source} has no 'model' with named tensors")
    check_weights(weights, source, size)
    if bare:
        return Checkpoint(source, dict(weights))
    step, state = payload.get("step", 0), payload.get("trainer_state")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{source} has step {_short(step)}, which is not a number of updates")
    optimizer = payload.get("optimizer")
    for name, value in (("meta", meta), ("trainer_state", state), ("optimizer", optimizer)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{source} has a {name} that is a {type(value).__name__}")
    meta = _plain(meta or {}, source)
    if meta.get("step", step) != step:
        raise CheckpointError(
            f"{source} contradicts itself: step {step}, in its metadata {meta['step']}"
        )
    return Checkpoint(source, dict(weights), optimizer, step, dict(state or {}), meta)


def _plain(meta: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Metadata as plain values, which go into messages and sidecars.

    Raises:
        CheckpointError: there is anything else among them, or more than a sidecar holds; or the
            metrics are not numbers.
    """
    room = SIDECAR_LIMIT // 4

    def copied(value: Any, depth: int) -> Any:
        nonlocal room
        if isinstance(value, Tensor) and is_held(value) and value.numel() == 1:
            value = value.item()
        room -= len(value) + 8 if isinstance(value, str) else 8
        if room < 0 or depth > 16:
            raise CheckpointError(f"{source} is refused: its metadata is larger than any run's")
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {copied(key, depth): copied(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [copied(entry, depth + 1) for entry in value]
        if value is None or isinstance(value, bool | str | float) or is_number(value):
            return value
        raise CheckpointError(f"{source}: its metadata has a {type(value).__name__} in it")

    plain: dict[str, Any] = copied(dict(meta), 0)
    if not are_metrics(plain.get("metrics") or {}):
        raise CheckpointError(f"{source} has metrics that are not numbers")
    return plain


def _short(value: Any) -> str:
    """For a message: what a value is, without printing much of it."""
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63):
        return repr(value)
    return f"a {type(value).__name__}"
