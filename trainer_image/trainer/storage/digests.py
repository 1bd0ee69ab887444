"""Digests by which records and artifacts name files: ``crc32c:…`` of one, ``sha256:…`` of several.

A CRC32C is in base64, as Cloud Storage gives it. Of several files it is the first 24 digits of the
SHA-256 over their names and CRC32Cs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from trainer.storage.places import open_location, split_uri


def as_crc32c(crc32c: str) -> str:
    """The digest of a file whose CRC32C is known."""
    return f"crc32c:{crc32c}"


def as_sha256(fingerprint: str) -> str:
    """The digest of what a fingerprint is known of; empty where that is."""
    return f"sha256:{fingerprint}" if fingerprint else ""


def digest_of_file(uri: str) -> str:
    """The digest of a file; in a bucket nothing is read.

    Raises:
        StorageError: it is missing, or cannot be read.
    """
    directory, name = split_uri(uri)
    return as_crc32c(open_location(directory).stat(name, checksum=True).crc32c or "")


def digest_of_sums(sums: Mapping[str, str]) -> str:
    """The digest of several files, by name their CRC32C."""
    text = json.dumps(dict(sums), sort_keys=True)
    return as_sha256(hashlib.sha256(text.encode()).hexdigest()[:24])


def digest_at(uri: str) -> str:
    """The digest of the files of a directory, without those below; in a bucket nothing is read.

    Raises:
        StorageError: it cannot be listed, or a file not be read.
    """
    location = open_location(uri)
    sums = {}
    for entry in location.list():
        sums[entry.name] = entry.crc32c or location.stat(entry.name, checksum=True).crc32c or ""
    return digest_of_sums(sums)
