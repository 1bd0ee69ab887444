"""Weights and the sidecar that vouches for them, written as a run writes its snapshots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from trainer.storage.base import Entry, Location
from trainer.storage.files import atomic_write, crc32c_of
from trainer.storage.uploads import Uploader, Write

SIDECAR = ".meta.json"


def sidecar_of(content: bytes, crc32c: str | None, **more: object) -> bytes:
    return json.dumps({"size": len(content), "crc32c": crc32c, **more}).encode()


class Pairs:
    """Submits contents under several names: sent under the first, copied to the others."""

    def __init__(self, uploads: Uploader, location: Location, workdir: Path) -> None:
        self.uploads, self.location, self.workdir = uploads, location, workdir

    def submit(
        self, content: bytes, *names: str, key: str | None = None, **more: object
    ) -> list[str]:
        """Returns the names of what was dropped in favour of it."""
        dropped: list[str] = []
        entries: list[Entry] = []
        for name in names:
            make = partial(self._writes, content, entries, more)
            dropped += self.uploads.submit([name, name + SIDECAR], make, key=key)
        return dropped

    def _writes(self, content: bytes, entries: list[Entry], more: dict[str, object]) -> list[Write]:
        def weights(name: str) -> Entry:
            if entries:
                return self.location.copy(entries[0], name)
            path = self.workdir / "made"
            with atomic_write(path) as file:
                file.write(content)
            entries.append(self.location.adopt(path, name, crc32c_of(path)))
            return entries[0]

        def sidecar(name: str) -> Entry:
            return self.location.put_bytes(sidecar_of(content, entries[0].crc32c, **more), name)

        return [weights, sidecar]


def difference(entry: Entry, sidecar: dict[str, object]) -> str:
    """What speaks against an entry being the one that a sidecar describes."""
    pairs = {"size": entry.size, "crc32c": entry.crc32c}
    return ", ".join(f"{k} {v}, not {sidecar[k]}" for k, v in pairs.items() if v != sidecar[k])


def names_of(entries: Sequence[Entry]) -> list[str]:
    return [entry.name for entry in entries]
