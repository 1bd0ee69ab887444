"""The sidecar beside a checkpoint: its metadata, with the size and checksum of the file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from trainer.checkpoints.fields import are_metrics, check_meta, plain, short
from trainer.checkpoints.metadata import current_form
from trainer.runtime.errors import CheckpointError
from trainer.runtime.strict_json import dumps
from trainer.storage.files import crc32c_of

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
