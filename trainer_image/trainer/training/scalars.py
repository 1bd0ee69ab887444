"""TensorBoard scalars, into ``AIP_TENSORBOARD_LOG_DIR`` or the work directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from trainer.runtime.errors import StorageError
from trainer.runtime.log import log
from trainer.storage.mirror import Mirror


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
        self._mirror = Mirror(self.target)
        self._writer = SummaryWriter(str(self._mirror.directory), purge_step=step + 1)

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
        try:
            self._mirror.flush()
        except StorageError as error:
            log.warning("TensorBoard scalars were not copied: %s", error)

    def close(self) -> None:
        """Flush, then release the files."""
        if self._writer is None:
            return
        self.flush()
        self._writer.close()
        self._mirror.close()
