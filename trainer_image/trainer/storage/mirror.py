"""A local directory whose files are also kept elsewhere, for writers that know local paths only."""

from __future__ import annotations

import tempfile
from pathlib import Path

from trainer.storage.places import is_remote, open_location


class Mirror:
    """The directory itself where it is local; of a ``gs://`` prefix a local one, sent by `flush`.

    Args:
        target: a local directory or ``gs://`` prefix.
    """

    def __init__(self, target: str) -> None:
        self._remote = open_location(target) if is_remote(target) else None
        self._scratch = tempfile.TemporaryDirectory(prefix="liquid-") if self._remote else None
        self.directory = Path(self._scratch.name if self._scratch else target)

    def flush(self) -> None:
        """Send every file of the directory.

        Raises:
            StorageError: one cannot be sent.
        """
        if self._remote is not None:
            for path in self.directory.iterdir():
                self._remote.put(path, path.name)

    def close(self) -> None:
        """Remove the local copy of what is kept elsewhere."""
        if self._scratch is not None:
            self._scratch.cleanup()
