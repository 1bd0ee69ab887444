"""Files of `torch.save`, archives of a pickle and of tensors: looked through before they are read.

They may be anybody's. torch's own reader runs no code of theirs, but takes sizes on trust.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import zipfile
from typing import Any, BinaryIO

import torch

from trainer.runtime.errors import CheckpointError
from trainer.runtime.pickles import PICKLE_LIMIT, check_pickle

_DIRECTORY_LIMIT = 16 << 20
"""Bytes of an archive's directory; a record takes about 100."""


def check_archive(file: BinaryIO, source: str) -> None:
    """Refuse what unpacks to more than it holds, and a pickle that `torch.save` did not write.

    Args:
        file: open for reading; left at its start.
        source: what messages call it.

    Raises:
        CheckpointError: naming what is wrong.
        MemoryError, OSError: this machine cannot read it.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
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
        if is_out_of_memory(error) or _is_machine_fault(error):
            raise
        raise _not_a_checkpoint(source, first_line(error)) from None
    check_pickle(program, records, source)
    file.seek(0)


def load_archive(file: BinaryIO, source: str) -> Any:
    """What a file holds that `check_archive` has passed, with its tensors in memory.

    Raises:
        CheckpointError: it is damaged nevertheless.
        MemoryError, RuntimeError, OSError: this machine cannot read it; see `is_out_of_memory`.
    """
    try:
        # An open file: torch takes a path that ends in .safetensors for another format
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it refers to {detail[1]}" if detail else "it holds more than tensors and numbers"
        raise CheckpointError(f"{source} is refused: {what}, which could run code") from None
    except Exception as error:  # a damaged pickle can raise anything
        if is_out_of_memory(error) or _is_machine_fault(error):
            raise
        first = first_line(error) or type(error).__name__
        raise CheckpointError(f"{source} cannot be read as a checkpoint: {first}") from None


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


def first_line(error: Exception, form: str = "{}") -> str:
    """A message's first line, formatted with ``form``; empty for an empty message."""
    lines = str(error).strip().splitlines()
    return form.format(lines[0][:200]) if lines else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no more memory."""
    # torch's allocator for the CPU raises a plain RuntimeError
    signs = ("DefaultCPUAllocator", "can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _is_machine_fault(error: Exception) -> bool:
    # EINVAL is damage: seeking to an offset before the file's start
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
