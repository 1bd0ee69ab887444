"""TensorBoard scalars in ``AIP_TENSORBOARD_LOG_DIR``, else beside the run's checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.runtime.errors import LiquidError
from trainer.runtime.log import log
from trainer.storage.base import Entry
from trainer.storage.files import in_home
from trainer.storage.places import is_remote, open_location
from trainer.storage.uploads import Uploader

DIRECTORY = "tensorboard"
"""Beside the checkpoints."""

_numbers = itertools.count()

_LAST_SECONDS = 5.0
"""How long the end of a run waits for the last copy; scalars are not worth more."""


def _own_name(output: str) -> str:
    """A directory's name for the scalars of the run of an output, and of no other."""
    path = output.rpartition("://")[2]
    last = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(path.split("/")[-3:])).strip("-.")
    return f"{last[-100:]}-{hashlib.sha256(output.encode()).hexdigest()[:8]}"


class ScalarLog:
    """Writes scalars to a directory; of a ``gs://`` one, `flush` sends a copy in the background.

    A run does not depend on them: the first failure to write is logged, and ends the recording.
    torch's writer has a thread of its own, whose failures come late, and with a traceback.

    Args:
        output: the run's; scalars go to its ``tensorboard`` directory. In one that the environment
            names, which may be that of several runs, they go to a directory of the run's own.
        step: updates done; TensorBoard hides what an earlier start recorded after them.
        enabled: False for processes other than the main one, which record nothing.
    """

    def __init__(self, output: str, *, step: int = 0, enabled: bool = True) -> None:
        self._file: BinaryIO | None = None
        if not enabled:
            return
        given = os.environ.get("AIP_TENSORBOARD_LOG_DIR", "").rstrip("/")
        self.target = f"{given}/{_own_name(output)}" if given else f"{output}/{DIRECTORY}"
        self._uploads: Uploader | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        with self._recording():
            directory = Path(in_home(self.target))
            if is_remote(self.target):
                self._location = open_location(self.target)
                self._uploads = Uploader(self._location)
                self._scratch = tempfile.TemporaryDirectory(prefix="liquid-")
                directory = Path(self._scratch.name)
            directory.mkdir(parents=True, exist_ok=True)
            name = (
                f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
                f".{next(_numbers)}"
            )
            self._path = directory / name
            self._file = open(self._path, "wb")  # noqa: SIM115 - until `close`
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Record scalars under their names after ``step`` updates."""
        summary = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with self._recording():
            self._write(Event(step=step, summary=Summary(value=summary)))

    def flush(self) -> None:
        """Queue a copy, if scalars are kept elsewhere."""
        if self._file is None:
            return
        with self._recording():
            self._path.stat()  # the file of a directory that is gone takes all that one writes
        if self._uploads is not None:
            with self._copying():
                name = self._path.name
                self._uploads.submit_extra(name, self._copy, key=name, told=False)

    def close(self) -> None:
        """Flush, then release the files."""
        if self._file is None:
            return
        self.flush()
        with self._recording():
            self._end()
        if self._uploads is not None:
            with self._copying():
                self._uploads.drain(_LAST_SECONDS)
            self._uploads.close(0.0)
        if self._scratch is not None:
            self._scratch.cleanup()

    def _copy(self, name: str) -> Entry:
        """Called in the uploads' thread."""
        return self._location.put_bytes(self._path.read_bytes(), name)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        try:
            yield
        except LiquidError as error:
            log.warning("TensorBoard scalars were not copied: %s", error)

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
