"""Digests of what a pipeline wrote, as JSON: the same program reads it here and in the image.

    python digests.py '{"prepare: tokens": ["directory", ["gs://BUCKET/tokens"]], …}' OUT.json

Metadata names places and times, so a checkpoint's digest is of its step and weights alone, and of
other files those count that hold numbers. Checksums among the teacher's targets cover its name,
so they are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

from trainer.checkpoints.reading import read_checkpoint
from trainer.storage.places import fetch, open_location
from trainer.targets.shards import CHECKSUM_BYTES, VALIDATION, parse_description, shard_number

_MOST = 1000
"""Files below one place."""


def of_checkpoint(path: Path) -> str:
    """Of a checkpoint's step and weights."""
    checkpoint = read_checkpoint(path)
    digest = hashlib.sha256(str(checkpoint.step).encode())
    for name, tensor in sorted(checkpoint.weights.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def of_losses(path: Path) -> str:
    """Of the losses in the evaluation's rows, in full precision."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    losses = [(row["context"], row["student_loss"], row["teacher_loss"]) for row in rows]
    return hashlib.sha256(json.dumps(losses).encode()).hexdigest()


def of_shard(path: Path, description: Path) -> str:
    """Of the records in a shard of the teacher's targets."""
    made, _ = parse_description(description.read_bytes(), path.name, str(description.parent))
    digest, number = hashlib.sha256(), shard_number(path.name)
    assert number is not None
    with path.open("rb") as shard:
        for window in made.windows_of(number):
            digest.update(shard.read(len(made.places_of(window)) * made.record_bytes))
            shard.seek(CHECKSUM_BYTES, os.SEEK_CUR)
    return digest.hexdigest()


def of_directories(uris: list[str], scratch: Path) -> dict[str, str]:
    """By name of a file in some places: of each checkpoint and each file of numbers."""
    found = {}
    for uri in uris:
        location = open_location(uri)
        entries = {entry.name: entry for entry in location.walk(most=_MOST)}
        for name in entries:
            copies = scratch / name
            copies.parent.mkdir(parents=True, exist_ok=True)
            suffix = copies.suffix
            if suffix not in (".pt", ".bin", ".safetensors"):
                continue
            path = fetch(f"{uri}/{name}", copies)[0]
            described = name.removesuffix(".bin") + ".json"
            if suffix == ".pt":
                found[name] = of_checkpoint(path)
            elif described in entries and name != VALIDATION:
                found[name] = of_shard(path, fetch(f"{uri}/{described}", scratch / described)[0])
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def digests(places: dict[str, tuple[str, list[str]]]) -> dict[str, dict[str, str]]:
    """By name of a place: the digests of its files.

    Args:
        places: by name, the kind (``directory``, ``checkpoint``, ``losses``) and where it lies;
            directories may be several.
    """
    of_file = {"checkpoint": of_checkpoint, "losses": of_losses}
    found = {}
    for name, (kind, uris) in places.items():
        with tempfile.TemporaryDirectory() as scratch:
            if kind == "directory":
                found[name] = of_directories(uris, Path(scratch))
            else:
                found[name] = {kind: of_file[kind](fetch(uris[0], Path(scratch, kind))[0])}
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(digests(json.loads(sys.argv[1])), indent=2))
