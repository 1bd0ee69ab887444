"""The sidecar beside a checkpoint: its metadata, with the size and checksum of the file.

Reading sidecars needs no torch, so picking a checkpoint does not wait for its import.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from trainer.checkpoints.fields import are_metrics, check_meta, plain, short
from trainer.checkpoints.metadata import NewerFormatError, current_form
from trainer.checkpoints.names import is_checkpoint_name, sidecar_name
from trainer.runtime.errors import CheckpointError
from trainer.runtime.log import log
from trainer.runtime.strict_json import dumps
from trainer.storage.base import Location, StorageMissingError, StorageTooLargeError
from trainer.storage.digests import as_crc32c, digest_of_sums
from trainer.storage.files import crc32c_of
from trainer.storage.places import open_location, split_uri

SIDECAR_LIMIT = 8 << 20
"""Bytes; a larger sidecar is not one of ours."""

WRITTEN_LIMIT = SIDECAR_LIMIT // 2
"""Bytes; well below, so that what is written can be read however metadata is counted there."""


@dataclass(frozen=True)
class Sidecar:
    """A checkpoint's metadata with the size and checksum of its file."""

    name: str
    size: int
    crc32c: str
    """Base64 of the big-endian CRC32C, as Cloud Storage gives it."""
    meta: dict[str, Any]
    file: str | None = field(default=None, compare=False)
    """The name that it was read with; another one where somebody copied the pair."""

    @property
    def step(self) -> int:
        """Updates done when the checkpoint was taken."""
        return int(self.meta["step"])

    @property
    def digest(self) -> str:
        """Of the file, as `trainer.storage.digests` writes it."""
        return as_crc32c(self.crc32c)

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation before it."""
        return self.meta["metrics"]

    def dump(self, spare: int = 0) -> bytes:
        """The JSON text.

        Args:
            spare: bytes that must be left below the limit.

        Raises:
            CheckpointError: it is larger than what is read again, or has a text that is no Unicode.
        """
        content = {**self.meta, "file": self.name, "size": self.size, "crc32c": self.crc32c}
        plain(self.meta, self.name)
        data = dumps(content, indent=2).encode()
        if len(data) > WRITTEN_LIMIT - spare:
            raise CheckpointError(
                f"the metadata of {self.name} takes {len(data)} bytes; at most"
                f" {WRITTEN_LIMIT - spare} are kept; give shorter schedules, names or contexts"
            )
        return data

    @classmethod
    def parse(cls, data: bytes, name: str) -> Sidecar:
        """Read a sidecar.

        Raises:
            NewerFormatError: it is of a later format.
            CheckpointError: it is not JSON, or a field is missing or of the wrong type.
        """
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise CheckpointError(f"sidecar of {name} is not JSON; delete it or the pair") from None
        if isinstance(content, dict):
            content = current_form(content, f"sidecar of {name}")
        kinds = {"size": int, "crc32c": str, "step": int, "metrics": dict}
        for key, kind in kinds.items():
            value = content.get(key) if isinstance(content, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise CheckpointError(f"sidecar of {name} has no valid {key!r}: {short(value)}")
        metrics = content["metrics"]
        if not are_metrics(metrics):
            raise CheckpointError(f"sidecar of {name} has metrics that are not numbers")
        # JSON has no NaN: `dump` writes null for what is not finite
        content["metrics"] = {k: math.nan if v is None else v for k, v in metrics.items()}
        if content["step"] < 0 or content["size"] < 0:
            raise CheckpointError(f"sidecar of {name} has a negative step or size")
        meta = plain(content, f"sidecar of {name}")
        check_meta(meta, content["step"], f"sidecar of {name}")
        described_file = meta.get("file")
        for key in ("file", "size", "crc32c"):
            meta.pop(key, None)
        return cls(name, content["size"], content["crc32c"], meta, described_file)


def verify_file(file: BinaryIO, sidecar: Sidecar, crc32c: str | None = None) -> None:
    """Check a checkpoint file against its sidecar.

    Args:
        file: open for reading.
        sidecar: what it is checked against.
        crc32c: the file's checksum where it has been computed already.

    Raises:
        CheckpointError: size or checksum differ.
    """
    size = os.fstat(file.fileno()).st_size
    if size != sidecar.size:
        raise CheckpointError(
            f"{sidecar.name} has {size} bytes, but its sidecar says {sidecar.size}: it was"
            " cut short or belongs to another sidecar"
        )
    crc32c = crc32c or crc32c_of(file)
    if crc32c != sidecar.crc32c:
        raise CheckpointError(
            f"{sidecar.name} has checksum {crc32c}, but its sidecar says {sidecar.crc32c}"
        )


def digest_of_all(sidecars: Iterable[Sidecar]) -> str:
    """The digest of the checkpoints of a location, by their sidecars."""
    return digest_of_sums({sidecar.name: sidecar.crc32c for sidecar in sidecars})


def read_sidecar(uri: str) -> Sidecar:
    """The sidecar of a checkpoint.

    Args:
        uri: of the checkpoint, a path or ``gs://``.

    Raises:
        CheckpointError: it is damaged or of another checkpoint.
        StorageError: there is none, or it cannot be read.
    """
    directory, name = split_uri(uri)
    return _read(open_location(directory), name)


def read_sidecars(location: Location) -> list[Sidecar]:
    """The sidecars of every checkpoint at a location that has one; damaged ones are logged.

    Raises:
        CheckpointError: one is of a newer format, which is no damage.
        StorageError: the location cannot be listed or read. A run that took that for an empty one
            would start over on top of what is there.
    """
    return read_sidecars_of(location, {entry.name for entry in location.list()})[0]


def read_sidecars_of(location: Location, names: set[str]) -> tuple[list[Sidecar], dict[str, str]]:
    """Also the checkpoints whose sidecars cannot be used, and why."""
    found: list[Sidecar] = []
    refused: dict[str, str] = {}
    for name in sorted(names):
        if not is_checkpoint_name(name) or sidecar_name(name) not in names:
            continue
        try:
            found.append(_read(location, name))
        except NewerFormatError:
            raise  # not damaged: an older program must not go on behind it
        except (CheckpointError, StorageMissingError, StorageTooLargeError) as error:
            log.warning("%s is passed over: %s", name, error)
            if not isinstance(error, StorageMissingError):  # which was removed meanwhile
                refused[name] = str(error)
    return found, refused


def _read(location: Location, name: str) -> Sidecar:
    """The sidecar of a checkpoint, unless it came with another one's name."""
    data = location.read_bytes(sidecar_name(name), limit=SIDECAR_LIMIT)
    sidecar = Sidecar.parse(data, name)
    if sidecar.file not in (None, sidecar.name):
        raise CheckpointError(
            f"sidecar of {sidecar.name} is of {str(sidecar.file)[:200]!r}: somebody copied or"
            " renamed the pair; move it away, or give it its name again"
        )
    return sidecar


def without_sidecar(names: set[str]) -> list[str]:
    """Of the names at a location the checkpoints that have no sidecar beside them, sorted."""
    return sorted(n for n in names if is_checkpoint_name(n) and sidecar_name(n) not in names)
