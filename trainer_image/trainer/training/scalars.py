"""TensorBoard scalars, into ``AIP_TENSORBOARD_LOG_DIR`` or the work directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from trainer.runtime.errors import StorageError
from trainer.runtime.log import log
from trainer.storage.places import is_remote, open_location


class ScalarLog:
    """Writes scalars locally; copies the event file to a ``gs://`` directory at `flush`.

    Args:
        workdir: its ``tensorboard`` directory is the place where the environment names none.
        step: updates done; what an earlier start recorded after it is hidden.
        enabled: False for processes that only take part.
    """

    def __init__(self, workdir: str, *, step: int = 0, enabled: bool = True) -> None:
        self._writer: SummaryWriter | None = None
        if not enabled:
            return
        self.target = os.environ.get("AIP_TENSORBOARD_LOG_DIR") or str(
            Path(workdir) / "tensorboard"
        )
        self._remote = open_location(self.target) if is_remote(self.target) else None
        self._scratch = tempfile.TemporaryDirectory(prefix="liquid-tb-") if self._remote else None
        self._directory = Path(self._scratch.name) if self._scratch else Path(self.target)
        self._writer = SummaryWriter(str(self._directory), purge_step=step + 1)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Record scalars under their names after ``step`` updates."""
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Make everything recorded so far visible; a failure to copy does not end the run."""
        if self._writer is None:
            return
        self._writer.flush()
        if self._remote is None:
            return
        try:
            for path in self._directory.rglob("events.*"):
                self._remote.put(path, path.name)
        except StorageError as error:
            log.warning("TensorBoard scalars were not copied: %s", error)

    def close(self) -> None:
        """Flush, then release the files."""
        if self._writer is None:
            return
        self.flush()
        self._writer.close()
        if self._scratch:
            self._scratch.cleanup()
