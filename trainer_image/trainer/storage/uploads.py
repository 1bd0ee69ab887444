"""Uploads in the background: training goes on while a snapshot travels.

    with Uploader(open_location("gs://bucket/run")) as uploads:
        uploads.submit_made(["best.pt", "best.pt.meta.json"], write_both, key="best.pt")
        uploads.submit_delete("ckpt_step_100.pt")
        uploads.check()

One thread works through a queue, in order, one group of files at a time. Files are opened when they
are submitted, or as soon as they are made, so that a later rename over their path, or its removal,
changes nothing for an upload that waits or runs. Their content must not be changed in place; if it
is, the upload fails.

The last file of a group vouches for the others: the sidecar of a checkpoint. When a group replaces
an older one, the old sidecar is removed first, then the weights are replaced, then the new sidecar
is written. At every instant a sidecar that is there describes the weights that are there, also
after a kill. A reader that took the old sidecar just before sees a size or CRC32C that differs, or
no file, and takes the next best.

The first failure ends the thread: what waits is dropped, so that nothing is removed behind an
upload that never arrived, and every later call raises it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO

from trainer.runtime.errors import LiquidError, StorageError
from trainer.runtime.log import log
from trainer.storage.base import Location, check_name
from trainer.storage.files import opened

PathLike = str | os.PathLike[str]


@dataclass
class _Group:
    """Files to upload, or one name to remove."""

    names: list[str]
    key: str | None = None
    make: Callable[[], Sequence[tuple[PathLike, str]]] | None = None
    """writes the files when their turn comes"""
    files: list[BinaryIO] = field(default_factory=list)
    """open files, one a name; none for a removal, or before they are made"""
    states: list[tuple[int, int]] = field(default_factory=list)
    """size and time of change of each file when it was submitted"""
    release: ExitStack = field(default_factory=ExitStack)


class Uploader:
    """Uploads to one location, and removes from it, behind the caller's back. Thread-safe.

    The thread is a daemon: a process that ends without `drain` or `close` abandons what is left,
    and no name is left half-written by that.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._queue: deque[_Group] = deque()
        self._running: _Group | None = None
        self._failure: LiquidError | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def submit(self, files: Sequence[tuple[PathLike, str]], *, key: str | None = None) -> list[str]:
        """Queue a group of files, uploaded in the order given; returns at once.

        Args:
            files: local path and name of each; the file that vouches for the others comes last.
            key: a group of the same key that still waits is dropped in favour of this one. The one
                in flight is finished. None: never dropped.

        Returns:
            The names of the group that was dropped; empty if none was.

        Raises:
            StorageError: a file cannot be opened, or the uploader is closed.
            LiquidError: an earlier upload failed.
        """
        group = _Group([check_name(name) for _, name in files], key)
        with ExitStack() as stack:
            group.files = [stack.enter_context(opened(path)) for path, _ in files]
            group.states = [_state(file) for file in group.files]
            group.release = stack.pop_all()
        try:
            return self._enqueue(group)
        except LiquidError:
            group.release.close()
            raise

    def submit_made(
        self,
        names: Sequence[str],
        make: Callable[[], Sequence[tuple[PathLike, str]]],
        *,
        key: str | None = None,
    ) -> list[str]:
        """Queue files that do not exist yet, so that writing them is off the caller's time too.

        Args:
            names: what they will be called; the one that vouches for the others comes last.
            make: called in the uploads' thread when their turn comes; writes the files and gives
                the local path of each name, in that order.
            key: as for `submit`.

        Returns:
            The names of the group that was dropped; empty if none was.

        Raises:
            LiquidError: an earlier upload failed, or the uploader is closed.
        """
        return self._enqueue(_Group([check_name(name) for name in names], key, make))

    def submit_delete(self, name: str) -> None:
        """Queue the removal of a name, behind the uploads that were submitted before.

        Raises:
            LiquidError: an earlier upload failed, or the uploader is closed.
        """
        self._enqueue(_Group([check_name(name)]))

    @property
    def waiting(self) -> int:
        """Groups not finished: those that wait and the one in flight."""
        with self._changed:
            return len(self._queue) + (self._running is not None)

    def wait_for_room(self, groups: int) -> None:
        """Wait until at most so many groups are not finished.

        Raises:
            LiquidError: an earlier upload failed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._failure is not None
                    or len(self._queue) + (self._running is not None) <= groups
                )
            )
        self.check()

    def check(self) -> None:
        """Raise the failure of an earlier upload, if there was one.

        Raises:
            LiquidError: that failure.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure

    def drain(self, timeout: float | None = None) -> None:
        """Wait until everything submitted so far has arrived.

        Args:
            timeout: seconds to wait at most.

        Raises:
            LiquidError: an upload failed.
            StorageError: the time was not enough; names what is missing.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._idle(), timeout)
            if self._failure is not None:
                raise self._failure
            if not self._idle():
                groups = ([self._running] if self._running else []) + list(self._queue)
                names = ", ".join(name for group in groups for name in group.names)
                raise StorageError(
                    f"not at {self._location.uri} after {timeout:g} s: {names};"
                    " the link is too slow or the time too short"
                )

    def close(self, timeout: float | None = None) -> None:
        """Drop what waits, let the upload in flight finish and end the thread.

        Args:
            timeout: seconds to wait for the one in flight.
        """
        with self._changed:
            self._closed = True
            dropped = [name for group in self._queue for name in group.names]
            self._drop_all()
        if dropped:
            log.warning("not uploaded to %s: %s", self._location.uri, ", ".join(dropped))
        self._thread.join(timeout)

    def __enter__(self) -> Uploader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            self.close()

    def _enqueue(self, group: _Group) -> list[str]:
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise StorageError(f"{group.names[0]}: uploads to this location have ended")
            older = [one for one in self._queue if group.key and one.key == group.key]
            for one in older:
                self._queue.remove(one)
                one.release.close()
            self._queue.append(group)
            self._changed.notify_all()
            return [name for one in older for name in one.names]

    def _idle(self) -> bool:
        return not self._queue and self._running is None

    def _drop_all(self) -> None:
        while self._queue:
            self._queue.popleft().release.close()
        self._changed.notify_all()

    def _work(self) -> None:
        # Stands unless the thread ends in a way that is known; Python prints the traceback
        failure: LiquidError | None = StorageError(
            f"uploading to {self._location.uri} ended by a defect; see the traceback before this"
        )
        try:
            self._work_through()
            failure = None
        except LiquidError as error:
            failure = error
        finally:
            with self._changed:
                self._failure = failure
                self._running = None
                self._drop_all()

    def _work_through(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                group = self._running = self._queue.popleft()
            with group.release:
                self._carry_out(group)

    def _carry_out(self, group: _Group) -> None:
        if group.make is not None:
            group.files = [group.release.enter_context(opened(path)) for path, _ in group.make()]
            group.states = [_state(file) for file in group.files]
        if not group.files:
            self._location.delete(group.names[0])
            return
        began = time.monotonic()
        if len(group.names) > 1:
            self._location.delete(group.names[-1])
        size = 0
        for file, name, state in zip(group.files, group.names, group.states, strict=True):
            _check_unchanged(file, name, state)
            size += self._location.put(file, name).size
            _check_unchanged(file, name, state)
        seconds = time.monotonic() - began
        log.info(
            "uploaded %s: %.1f MB in %.1f s",
            self._location.child(group.names[0]),
            size / 1e6,
            seconds,
        )


def _state(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _check_unchanged(file: BinaryIO, name: str, state: tuple[int, int]) -> None:
    if _state(file) != state:
        raise StorageError(
            f"the local file of {name} was changed in place before its upload had ended; write a"
            " new file and rename it"
        )
