"""Recording a run: lines of ``metrics.jsonl`` that no kill tears out, doubles or leaves behind.

    recorder = Recorder(location)
    recorder.begin(header, step=100)
    recorder.add(UPDATE, 150, {"loss": 3.2})
    recorder.send(snapshots.keep)

A snapshot is never at the output before the lines up to its step are: `send` is called before each
one is queued, behind the same thread. A run that goes on from a snapshot drops the lines beyond its
step, and makes them anew; what it makes anew of its own step is there already and is left out.

In a directory each line is appended when it is made, and forced to disk by `send`; an object is
written whole by `send`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from io import FileIO
from typing import Any

from trainer.metrics.lines import (
    END,
    FILE_LIMIT,
    FORMAT,
    HEADER,
    METRICS,
    START,
    Line,
    NewerMetricsError,
    encode,
    parse,
)
from trainer.runtime.errors import MetricsError
from trainer.runtime.log import log, without_secrets
from trainer.storage.base import Entry, Location, StorageMissingError, StorageTooLargeError
from trainer.storage.files import os_errors, to_disk
from trainer.storage.places import is_remote
from trainer.storage.uploads import Write


def now() -> str:
    """This moment as ISO 8601 has it, in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Recorder:
    """The record of one run at its output location, which the main process alone writes.

    Args:
        location: where its checkpoints are.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._uri = location.child(METRICS)
        self._data = bytearray()
        """All lines."""
        self._sent = 0
        """Bytes of them that `send` has queued."""
        self._file: FileIO | None = None
        """In a directory: open for appending."""
        self._appended = 0
        """Bytes of the lines that are in that file."""
        self._lock = threading.Lock()
        self._there: set[tuple[str, int, Any]] = set()
        """Kind, step and name of the lines at the step that the run goes on from."""

    def begin(
        self,
        header: Mapping[str, Any],
        step: int,
        of_another_run: Callable[[Mapping[str, Any]], str],
        *,
        expected: bool,
    ) -> None:
        """Take over the lines of earlier starts up to a step, or begin a record.

        A record that is damaged, or of another run, is kept under another name.

        Args:
            header: of a new record, its kind and format left out.
            step: updates done.
            of_another_run: what tells the header of a record from this run's; empty for its own.
            expected: whether there should be a record, as the run goes on from a snapshot.

        Raises:
            MetricsError: the record is of a newer format.
            StorageError: it cannot be read, or this one not be written.
        """
        found = self._earlier(of_another_run)
        if found:
            kept = [line for line in found if line.step <= step and line.kind != END]
            self._there = {
                _key(line.kind, line.step, line.fields) for line in kept if line.step == step
            }
            self._data = bytearray(b"".join(line.data for line in kept))
            start = {"step": step, "time": now(), "machine": header["machine"]}
            self._data += encode(START, start)
        else:
            if expected:
                log.warning("there is no %s of this run yet: it begins at step %d", self._uri, step)
            line = encode(HEADER, {"format": FORMAT, **header})
            self._data = bytearray(without_secrets(line.decode()).encode())
        if not is_remote(self._uri):
            self._write_whole(METRICS)

    def add(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Record a line, unless the same one of this step was there when the run went on.

        Args:
            kind: of line.
            step: updates done.
            fields: the further ones, in order.

        Raises:
            StorageError: it cannot be written.
        """
        key = _key(kind, step, fields)
        if key in self._there:
            return
        with self._lock:
            self._data += encode(kind, {"step": step, **fields})
            self._append()

    def send(self, keep: Callable[[str, Write], None]) -> None:
        """Queue the lines so far; what is queued afterwards arrives after them.

        Args:
            keep: `trainer.checkpoints.snapshots.Snapshots.keep`.

        Raises:
            LiquidError: what was queued before could not be written.
        """
        if self._sent < len(self._data):
            self._sent = len(self._data)
            keep(METRICS, self._write)

    def close(self) -> None:
        """Release the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _write(self, name: str) -> Entry:
        """Called in the uploads' thread; lines that were added since `send` may go along."""
        with self._lock:
            if self._file is None or not os.path.exists(self._uri):
                return self._write_whole(name)
            self._append()
            file = self._file
        with os_errors("writing", self._uri):
            to_disk(file)
        return Entry(name, self._appended, None, 0, time.time())

    def _write_whole(self, name: str) -> Entry:
        entry = self._location.put_bytes(bytes(self._data), name)
        if not is_remote(self._uri):
            self.close()
            with os_errors("writing", self._uri):
                self._file = open(self._uri, "ab", buffering=0)  # noqa: SIM115 - until `close`
            self._appended = len(self._data)
        return entry

    def _append(self) -> None:
        """Bring the file of a directory up to date; a line that it has no room for is cut off."""
        if self._file is None:
            return
        with os_errors("writing", self._uri):
            try:
                left = memoryview(bytes(self._data[self._appended :]))
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._appended)
                raise
        self._appended = len(self._data)

    def _earlier(self, of_another_run: Callable[[Mapping[str, Any]], str]) -> list[Line]:
        """The lines of earlier starts of this run; none where there are none that can be used."""
        try:
            lines = parse(self._location.read_bytes(METRICS, limit=FILE_LIMIT), self._uri)
        except StorageMissingError:
            return []
        except NewerMetricsError:
            raise
        except (MetricsError, StorageTooLargeError) as error:
            self._keep_aside(str(error))
            return []
        if not lines or not (changed := of_another_run(lines[0].fields)):
            return lines
        if any(line.kind not in (HEADER, START) for line in lines):
            self._keep_aside(f"{self._uri} is of another run ({changed})")
        return []

    def _keep_aside(self, reason: str) -> None:
        entry = self._location.stat(METRICS, checksum=True)
        aside = METRICS.replace(".", f"-before-{time.time_ns() // 1000}.")
        self._location.copy(entry, aside)
        log.warning("%s; it is kept as %s", reason, self._location.child(aside))


def _key(kind: str, step: int, fields: Mapping[str, Any]) -> tuple[str, int, Any]:
    return kind, step, fields.get("name")
