"""A run's checkpoints at its output location: found again at a start, written in the background."""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer import checkpoint as ckpt
from trainer.checkpoint import Checkpoint, Sidecar, Snapshot
from trainer.errors import CheckpointError, LiquidError, StorageError
from trainer.log import log
from trainer.storage import Location, fetch, is_remote, open_location

_WAITING = 1
"""Snapshots that may wait behind the one in flight before training waits too."""


def read_sidecars(location: Location) -> list[Sidecar]:
    """The sidecars of every checkpoint at a location that has one; unreadable ones are logged."""
    names = {entry.name for entry in location.list()}
    found: list[Sidecar] = []
    for name in sorted(names):
        if not ckpt.is_checkpoint_name(name) or ckpt.sidecar_name(name) not in names:
            continue
        try:
            data = location.read_bytes(ckpt.sidecar_name(name), limit=ckpt.SIDECAR_LIMIT)
            found.append(Sidecar.parse(data, name))
        except (CheckpointError, StorageError) as error:
            log.warning("%s is passed over: %s", name, error)
    return found


def read_verified(location: Location, sidecar: Sidecar, workdir: Path) -> Checkpoint:
    """The checkpoint a sidecar names, checked against it.

    Raises:
        CheckpointError: it does not match its sidecar, or cannot be read.
        StorageError: it cannot be fetched.
    """
    uri = location.child(sidecar.name)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=workdir) as scratch:
        path = fetch(uri, Path(scratch))
        ckpt.verify_file(path, sidecar)
        checkpoint = ckpt.read_checkpoint(path, uri)
    if checkpoint.step != sidecar.step:
        raise CheckpointError(
            f"{uri} is at step {checkpoint.step}, but its sidecar says {sidecar.step}"
        )
    return checkpoint


def read_from(uri: str, workdir: Path) -> Checkpoint:
    """A checkpoint by its own URI; its sidecar is checked where there is one.

    Raises:
        CheckpointError, StorageError: it is missing, damaged or refused.
    """
    parent, _, name = uri.rpartition("/")
    location = open_location(parent or ("/" if uri.startswith("/") else "."))
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        data = location.read_bytes(ckpt.sidecar_name(name), limit=ckpt.SIDECAR_LIMIT)
    except StorageError:
        data = None
    if data is not None:
        return read_verified(location, Sidecar.parse(data, name), workdir)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=workdir) as scratch:
        return ckpt.read_checkpoint(fetch(uri, Path(scratch)), uri)


@dataclass
class _Job:
    snapshot: Snapshot
    names: list[str]


class Snapshots:
    """Checkpoints of one run at its output location.

    `save` returns at once: a thread writes the file, uploads it and its sidecar under each name,
    and applies retention. One snapshot is in flight and one may wait; of two that wait to become
    ``best.pt`` the newer wins. A failure is raised by the next `save` or by `finish`.

    Under the rolling name the old sidecar goes before the new file comes, so that at no time does
    a sidecar stand beside weights it does not describe. The file of the same snapshot under its
    own name (``ckpt_best_step…``) is written before, so a whole best exists throughout.
    """

    def __init__(self, uri: str, workdir: str) -> None:
        self.uri = uri
        self.location = open_location(uri)
        self.workdir = Path(workdir)
        self._condition = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._busy = False
        self._failure: LiquidError | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint of this location; damaged ones are logged and passed over."""
        candidates = read_sidecars(self.location)
        candidates.sort(key=lambda one: (one.step, one.name == ckpt.FINAL), reverse=True)
        self.workdir.mkdir(parents=True, exist_ok=True)
        for sidecar in candidates:
            try:
                return read_verified(self.location, sidecar, self.workdir)
            except CheckpointError as error:
                log.warning("%s; the next newest is tried", error)
        return None

    def check_writable(self) -> None:
        """Fail now rather than at the first checkpoint.

        Raises:
            StorageError: the location does not exist or may not be written.
        """
        self.location.check_writable()

    def save(self, snapshot: Snapshot, names: Iterable[str]) -> None:
        """Queue a snapshot under its names.

        Raises:
            LiquidError: an earlier snapshot could not be written.
        """
        # Its own names first, then the rolling one; final.pt says that all the others are there
        order = {ckpt.BEST: 1, ckpt.FINAL: 2}
        job = _Job(snapshot, sorted(dict.fromkeys(names), key=lambda name: order.get(name, 0)))
        with self._condition:
            self._raise_failure()
            if ckpt.BEST in job.names:
                for older in self._waiting:
                    older.names = [name for name in older.names if name != ckpt.BEST]
            while len(self._waiting) >= _WAITING and self._failure is None:
                self._condition.wait()
            self._raise_failure()
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="snapshots", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def finish(self) -> None:
        """Wait until everything queued is at the location.

        Raises:
            LiquidError: a snapshot could not be written.
        """
        with self._condition:
            while (self._waiting or self._busy) and self._failure is None:
                self._condition.wait()
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._waiting:
                    self._condition.wait()
                job = self._waiting.popleft()
                self._busy = True
                self._condition.notify_all()
            failure: LiquidError | None = None
            try:
                self._write(job)
            except LiquidError as error:
                failure = error
            except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to
                failure = StorageError(f"{', '.join(job.names)} could not be written: {error}")
                failure.__cause__ = error
            with self._condition:
                self._busy = False
                self._failure = self._failure or failure
                self._condition.notify_all()

    def _write(self, job: _Job) -> None:
        if not job.names:
            return
        local = None if is_remote(self.uri) else Path(self.uri)
        (local or self.workdir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".staging-", dir=local or self.workdir) as scratch:
            path = Path(scratch) / "snapshot.pt"
            sidecar = job.snapshot.write(path)
            for name in job.names:
                self._put(path, sidecar, name)
        log.info("step %d saved as %s", job.snapshot.step, ", ".join(job.names))
        for name in ckpt.outdated(entry.name for entry in self.location.list()):
            self.location.delete(ckpt.sidecar_name(name))
            self.location.delete(name)

    def _put(self, path: Path, sidecar: Sidecar, name: str) -> None:
        if name == ckpt.BEST:
            self.location.delete(ckpt.sidecar_name(name))
        self.location.put(path, name)
        named = Sidecar(name, sidecar.size, sidecar.crc32c, sidecar.meta)
        self.location.put_bytes(named.dump(), ckpt.sidecar_name(name))
