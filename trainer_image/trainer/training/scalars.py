"""TensorBoard scalars in ``AIP_TENSORBOARD_LOG_DIR``, else in the work directory."""

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
        workdir: scalars go to its ``tensorboard`` directory if the environment names no other.
        step: updates done; TensorBoard hides what an earlier start recorded after them.
        enabled: False for processes other than the main one, which record nothing.
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
        """Write out everything recorded so far; a failure to copy it does not end the run."""
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
