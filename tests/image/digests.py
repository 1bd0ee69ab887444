"""Digests of what a pipeline wrote, as JSON: the same program reads it here and in the image.

    python digests.py '{"prepare tokens": ["directory", "gs://BUCKET/tokens"], …}' OUT.json

Metadata names places and times, so a checkpoint's digest is of its step and weights alone, and of
other files those count that hold numbers.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from trainer.checkpoints.reading import read_checkpoint
from trainer.storage.places import fetch, open_location

_NUMBERS = (".bin", ".safetensors")
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


def of_directory(uri: str, scratch: Path) -> dict[str, str]:
    """By path below a place: of each checkpoint and each file of numbers."""
    location, found = open_location(uri), {}
    for entry in location.walk(most=_MOST):
        copy = scratch / entry.name.replace("/", "_")
        if entry.name.endswith(".pt"):
            found[entry.name] = of_checkpoint(fetch(location.child(entry.name), copy)[0])
        elif entry.name.endswith(_NUMBERS):
            path = fetch(location.child(entry.name), copy)[0]
            found[entry.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def digests(places: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """By name of a place: its digest or, of a directory, those of its files.

    Args:
        places: by name, the kind (``directory``, ``checkpoint``, ``losses``) and where it lies.
    """
    of_file = {"checkpoint": of_checkpoint, "losses": of_losses}
    found: dict[str, Any] = {}
    for number, (name, (kind, uri)) in enumerate(places.items()):
        with tempfile.TemporaryDirectory() as scratch:
            if kind == "directory":
                found[name] = of_directory(uri, Path(scratch))
            else:
                found[name] = of_file[kind](fetch(uri, Path(scratch, str(number)))[0])
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(digests(json.loads(sys.argv[1])), indent=2))
