"""TensorBoard scalars in ``AIP_TENSORBOARD_LOG_DIR``, else in the work directory."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.runtime.errors import StorageError
from trainer.runtime.log import log
from trainer.storage.mirror import Mirror

_numbers = itertools.count()


class ScalarLog:
    """Writes scalars locally; copies the event file to a ``gs://`` directory at `flush`.

    A run does not depend on them: the first failure to write is logged, and ends the recording.
    torch's writer has a thread of its own, whose failures come late, and with a traceback.

    Args:
        workdir: scalars go to its ``tensorboard`` directory if the environment names no other.
        step: updates done; TensorBoard hides what an earlier start recorded after them.
        enabled: False for processes other than the main one, which record nothing.
    """

    def __init__(self, workdir: str, *, step: int = 0, enabled: bool = True) -> None:
        self._file: BinaryIO | None = None
        if not enabled:
            return
        self.target = os.environ.get("AIP_TENSORBOARD_LOG_DIR") or str(
            Path(workdir) / "tensorboard"
        )
        with self._recording():
            self._mirror = Mirror(self.target)
            self._mirror.directory.mkdir(parents=True, exist_ok=True)
            name = (
                f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
                f".{next(_numbers)}"
            )
            self._path = self._mirror.directory / name
            self._file = open(self._path, "wb")  # noqa: SIM115 - until `close`
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Record scalars under their names after ``step`` updates."""
        summary = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with self._recording():
            self._write(Event(step=step, summary=Summary(value=summary)))

    def flush(self) -> None:
        """Send a copy, if scalars are kept elsewhere."""
        if self._file is None:
            return
        with self._recording():
            self._path.stat()  # the file of a directory that is gone takes all that one writes
            try:
                self._mirror.flush()
            except StorageError as error:
                log.warning("TensorBoard scalars were not copied: %s", error)

    def close(self) -> None:
        """Flush, then release the files."""
        if self._file is None:
            return
        self.flush()
        with self._recording():
            self._end()
            self._mirror.close()

    def _write(self, event: Event) -> None:
        if self._file is not None:
            event.wall_time = time.time()
            RecordWriter(self._file).write(event.SerializeToString())
            self._file.flush()

    def _end(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning(
                "%s: TensorBoard scalars are not recorded any more: %s",
                self.target,
                error.strerror or error,
            )
            with contextlib.suppress(OSError):
                self._end()
