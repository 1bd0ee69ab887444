"""Scratch directories that a later process clears away if the one that made them was killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

from trainer.storage.files import os_errors

_KINDS = ("staging", "fetch", "publish")

_made: set[str] = set()
"""Names of this process's own, which are in use."""


def scratch_directory(kind: str, parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A new directory, removed at the end of a `with` block or with the object.

    Args:
        kind: what it is for: ``staging``, ``fetch`` or ``publish``.
        parent: where to make it; made too if it is missing.

    Raises:
        StorageError: it cannot be made.
    """
    assert kind in _KINDS
    prefix = f".{kind}-{socket.gethostname()}-{os.getpid()}-"
    with os_errors("making a directory in", parent):
        parent.mkdir(parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
    _made.add(Path(directory.name).name)
    return directory


def remove_abandoned_scratch(parent: Path) -> None:
    """Remove the scratch directories of killed processes of this machine.

    Containers reuse PIDs: our own PID on a directory that we did not make means a dead process.
    """
    kinds = "|".join(_KINDS)
    pattern = re.compile(rf"\.(?:{kinds})-{re.escape(socket.gethostname())}-(\d+)-.*")
    for path in parent.glob(".*-*"):
        match = pattern.fullmatch(path.name)
        if match is None or path.name in _made:
            continue
        if int(match[1]) == os.getpid() or not _is_running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
