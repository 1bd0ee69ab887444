"""Writes in the background: training goes on while a snapshot travels.

    uploads = Uploader(open_location("gs://bucket/run"))
    uploads.submit(["best.pt", "best.pt.meta.json"], make, key="best.pt")
    uploads.submit_delete("ckpt_step_100.pt")
    uploads.drain()

One thread works through a queue, in order, one group of files at a time.

The last file of a group vouches for the others: the sidecar of a checkpoint. When a group replaces
an older one, the old sidecar is removed first, then the weights are replaced, then the new sidecar
is written. At every instant a sidecar that is there describes the weights that are there, also
after a kill. A reader that took the old sidecar just before sees a size or CRC32C that differs, or
no file, and takes the next best.

The first failure ends the thread: what waits is dropped, so that nothing is removed behind an
upload that never arrived, and every later call raises it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.runtime.errors import LiquidError, StorageError
from trainer.runtime.log import log
from trainer.runtime.messages import one_line
from trainer.storage.base import Entry, Location, check_name

Write = Callable[[str], Entry]
"""Writes one file under the name that it is given."""


@dataclass
class _Group:
    """Files to write, or one name to remove."""

    names: list[str]
    make: Callable[[], Sequence[Write]] | None
    """Gives what writes each file; None for a removal."""
    key: str | None = None
    extra: bool = False
    """Whether nothing depends on it."""
    told: bool = True
    """Whether the log tells of its arrival."""


class Uploader:
    """Writes to one location, and removes from it, behind the caller's back. Thread-safe.

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

    def submit(
        self,
        names: Sequence[str],
        make: Callable[[], Sequence[Write]],
        *,
        key: str | None = None,
        told: bool = True,
    ) -> list[str]:
        """Queue a group of files; returns at once.

        Args:
            names: what they will be called; the one that vouches for the others comes last.
            make: called in the uploads' thread when their turn comes; makes what they will hold and
                gives what writes each of them, in that order.
            key: a group of the same key that still waits is dropped in favour of this one. The one
                in flight is finished. None: never dropped.
            told: whether the log tells of its arrival.

        Returns:
            The names of the group that was dropped; empty if none was.

        Raises:
            LiquidError: an earlier upload failed, or the uploader is closed.
        """
        return self._enqueue(_Group([check_name(name) for name in names], make, key, told=told))

    def submit_extra(
        self, name: str, write: Write, *, key: str | None = None, told: bool = True
    ) -> None:
        """Queue a file that nothing depends on: a failure to write it is logged, and ends nothing.

        Args:
            name: what it will be called.
            write: called in the uploads' thread.
            key: as for `submit`.
            told: as for `submit`.

        Raises:
            LiquidError: an earlier upload failed, or the uploader is closed.
        """
        self._enqueue(_Group([check_name(name)], lambda: [write], key, extra=True, told=told))

    def submit_delete(self, name: str) -> None:
        """Queue the removal of a name, behind the uploads that were submitted before.

        Raises:
            LiquidError: an earlier upload failed, or the uploader is closed.
        """
        self._enqueue(_Group([check_name(name)], None))

    def wait_for_room(self, groups: int) -> None:
        """Wait until at most so many groups are not finished.

        Raises:
            LiquidError: an earlier upload failed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure is not None or len(self._unfinished()) <= groups
            )
        self.check()

    def unsent(self) -> list[str]:
        """The names that are not written yet, of files that the log tells of the arrival of."""
        with self._changed:
            groups = [
                group
                for group in self._unfinished()
                if group.make and group.told and not group.extra
            ]
            return [name for group in groups for name in group.names]

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
            self._changed.wait_for(
                lambda: self._failure is not None or not self._unfinished(), timeout
            )
            self.check()
            if groups := self._unfinished():
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
            self._queue.clear()
            self._changed.notify_all()
        if dropped:
            log.warning("not written to %s: %s", self._location.uri, ", ".join(dropped))
        self._thread.join(timeout)

    def _enqueue(self, group: _Group) -> list[str]:
        with self._changed:
            self.check()
            if self._closed:
                raise StorageError(f"{group.names[0]}: uploads to this location have ended")
            dropped = [other for other in self._queue if group.key and other.key == group.key]
            for other in dropped:
                self._queue.remove(other)
            self._queue.append(group)
            self._changed.notify_all()
            return [name for other in dropped for name in other.names]

    def _unfinished(self) -> list[_Group]:
        """The group in flight, and those that wait."""
        return ([self._running] if self._running else []) + list(self._queue)

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
                self._queue.clear()
                self._changed.notify_all()

    def _work_through(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                group = self._running = self._queue.popleft()
            if group.extra:
                self._try_out(group)
            else:
                self._carry_out(group)

    def _try_out(self, group: _Group) -> None:
        try:
            self._carry_out(group)
        except Exception as error:  # noqa: BLE001 - nothing depends on it
            place = self._location.child(group.names[0])
            log.warning("%s is not kept: %s", place, one_line(error))

    def _carry_out(self, group: _Group) -> None:
        if group.make is None:
            self._location.delete(group.names[0])
            return
        writes = group.make()
        began = time.monotonic()
        if len(group.names) > 1:
            self._location.delete(group.names[-1])
        written = [write(name) for write, name in zip(writes, group.names, strict=True)]
        kind = logging.INFO if group.told else logging.DEBUG
        size = sum(entry.size for entry in written) / 1e6
        place = self._location.child(group.names[0])
        if "://" in place:
            took = time.monotonic() - began
            log.log(kind, "uploaded %s: %.1f MB in %.1f s", place, size, took)
        else:
            log.log(kind, "saved %s: %.1f MB", place, size)  # often renamed or linked, in no time
