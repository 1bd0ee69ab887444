"""A run's checkpoints at its output location: found again at a start, written in the background."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from trainer.checkpoints.checkpoint import Checkpoint, Snapshot
from trainer.checkpoints.metadata import NewerFormatError, run_settings_of
from trainer.checkpoints.names import (
    BEST,
    FINAL,
    is_best_of,
    is_checkpoint_name,
    outdated,
    sidecar_name,
)
from trainer.checkpoints.reading import read_checkpoint
from trainer.checkpoints.sidecar import SIDECAR_LIMIT, Sidecar, verify_file
from trainer.runtime.errors import CheckpointError, LiquidError
from trainer.runtime.log import log
from trainer.storage.base import Entry, Location, StorageMissingError, StorageTooLargeError
from trainer.storage.files import os_errors
from trainer.storage.places import fetch, open_location, split_uri, working_directory
from trainer.storage.scratch import remove_abandoned_scratch, scratch_directory
from trainer.storage.uploads import Uploader, Write

RESCUE_SECONDS = 600.0

_IN_FLIGHT = 8
"""Files and removals that may be queued when a new snapshot comes, about those of one before it."""


def read_sidecars(location: Location) -> list[Sidecar]:
    """The sidecars of every checkpoint at a location that has one; damaged ones are logged.

    Raises:
        CheckpointError: one is of a newer format, which is no damage.
        StorageError: the location cannot be listed or read. A run that took that for an empty one
            would start over on top of what is there.
    """
    return _read_sidecars(location)[0]


def _read_sidecars(location: Location) -> tuple[list[Sidecar], dict[str, str]]:
    """Also the checkpoints whose sidecars cannot be used, and why."""
    names = {entry.name for entry in location.list()}
    found: list[Sidecar] = []
    refused: dict[str, str] = {}
    for name in sorted(names):
        if not is_checkpoint_name(name) or sidecar_name(name) not in names:
            continue
        try:
            data = location.read_bytes(sidecar_name(name), limit=SIDECAR_LIMIT)
            found.append(Sidecar.parse(data, name))
        except NewerFormatError:
            raise  # not damaged: an older program must not go on behind it
        except (CheckpointError, StorageMissingError, StorageTooLargeError) as error:
            log.warning("%s is passed over: %s", name, error)
            if not isinstance(error, StorageMissingError):  # which was removed meanwhile
                refused[name] = str(error)
    return found, refused


def read_verified(location: Location, sidecar: Sidecar, workdir: Path) -> Checkpoint:
    """The checkpoint a sidecar names, checked against it.

    Raises:
        CheckpointError: it does not match its sidecar, or cannot be read.
        StorageError: it cannot be fetched.
    """
    uri = location.child(sidecar.name)
    with scratch_directory("fetch", workdir) as scratch:
        path, crc32c = fetch(uri, Path(scratch))
        verify_file(path, sidecar, crc32c)
        checkpoint = read_checkpoint(path, uri)
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
    parent, name = split_uri(uri)
    location = open_location(parent)
    remove_abandoned_scratch(workdir)
    try:
        data = location.read_bytes(sidecar_name(name), limit=SIDECAR_LIMIT)
    except StorageMissingError:
        data = None
    if data is not None:
        return read_verified(location, Sidecar.parse(data, name), workdir)
    with scratch_directory("fetch", workdir) as scratch:
        return read_checkpoint(fetch(uri, Path(scratch))[0], uri)


class _Staged:
    """A snapshot on its way: written and sent once, then copied to its further names."""

    def __init__(self, snapshot: Snapshot, location: Location, directory: Path) -> None:
        self._snapshot: Snapshot | None = snapshot
        self._location = location
        self._parent = directory
        self._meta = snapshot.meta
        self._first: Entry | None = None

    def writes(self, name: str) -> list[Write]:
        """What writes weights and sidecar under a name, in the uploads' thread."""
        return [self._write_weights(), partial(self._write_sidecar, name)]

    def _write_weights(self) -> Write:
        if self._first is not None:
            return partial(self._location.copy, self._first)
        assert self._snapshot is not None
        directory = scratch_directory("staging", self._parent)
        path = Path(directory.name) / "snapshot.pt"
        _, crc32c = self._snapshot.write_file(path)
        self._snapshot = None

        def send(name: str) -> Entry:
            with directory:
                self._first = self._location.adopt(path, name, crc32c)
            return self._first

        return send

    def _write_sidecar(self, name: str, sidecar: str) -> Entry:
        assert self._first is not None
        assert self._first.crc32c is not None
        described = Sidecar(name, self._first.size, self._first.crc32c, self._meta)
        return self._location.put_bytes(described.dump(), sidecar)


class Snapshots:
    """Checkpoints of one run at its output location.

    `save` returns at once: the file is written and uploaded by `trainer.storage.uploads.Uploader`,
    under each of its names with a sidecar, and retention follows behind. A failure is raised by the
    next `save` or by `finish`.

    A snapshot's own name (``ckpt_best_step…``) comes before the rolling ``best.pt``, so a whole
    best exists at every instant; ``final.pt`` comes last and says that all the others are there.
    """

    def __init__(self, uri: str, workdir: str) -> None:
        self.uri = uri
        self.location = open_location(uri)
        self.workdir = Path(workdir)
        self._staging = working_directory(uri, self.workdir)
        self._uploads: Uploader | None = None
        self._names: set[str] = set()
        """Checkpoints of this run, which retention may remove."""
        self._goes_on = False

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are logged and passed over. None: no run yet.

        Weights of a run without a sidecar are what a kill leaves of an upload, and no snapshot.

        Raises:
            CheckpointError: there are snapshots, but none can be used, or there is somebody's
                checkpoint that is of no run; a run that started would do so on top of them.
            StorageError: the location or this machine keeps one from being read.
        """
        candidates, unreadable = _read_sidecars(self.location)
        candidates.sort(key=lambda sidecar: (sidecar.step, sidecar.name == FINAL), reverse=True)
        with os_errors("making", self.workdir):
            self.workdir.mkdir(parents=True, exist_ok=True)
        remove_abandoned_scratch(self.workdir)
        refused: dict[str, str] = {}
        for sidecar in candidates:
            try:
                found = read_verified(self.location, sidecar, self.workdir)
                self._goes_on = True
                return found
            except NewerFormatError:
                raise
            except (CheckpointError, StorageMissingError) as error:
                log.warning("%s; the next newest is tried", error)
                if not isinstance(error, StorageMissingError):
                    refused[sidecar.name] = str(error)
        refused |= unreadable
        if refused:
            names, newest = ", ".join(refused), next(iter(refused.values()))
            raise CheckpointError(
                f"{self.uri} holds snapshots of a run, but none can be used ({names}): {newest};"
                " put a whole one there, or give another --output_gcs_uri or --local_workdir to"
                " start over"
            )
        self._refuse_foreign()
        return None

    def _refuse_foreign(self) -> None:
        """Where no sidecar tells: every checkpoint there must be a run's, whose upload was killed.

        The base package's have the same names, and would be overwritten.
        """
        for entry in self.location.list():
            if not is_checkpoint_name(entry.name):
                continue
            uri = self.location.child(entry.name)
            try:
                run_settings_of(read_from(uri, self.workdir).meta)
            except StorageMissingError:
                continue
            except CheckpointError as error:
                raise CheckpointError(
                    f"{uri} has no sidecar and is no snapshot of this run ({error}); give another"
                    " --output_gcs_uri or --local_workdir"
                ) from None

    def restore_best(self, step: int) -> None:
        """Let the rolling best be the best again, where a kill came before it was there.

        Args:
            step: of the best checkpoint, as the run's newest snapshot tells.

        Raises:
            StorageError: it cannot be read or written.
        """
        sidecars = {sidecar.name: sidecar for sidecar in read_sidecars(self.location)}
        rolling = sidecars.get(BEST)
        best = next((sidecars[name] for name in sidecars if is_best_of(name, step)), None)
        if best is None or (rolling is not None and rolling.step >= step):
            return
        whole = self.location.stat(best.name, checksum=True)
        if (whole.size, whole.crc32c) != (best.size, best.crc32c):
            log.warning("%s is not what its sidecar says, so %s is left as it is", best.name, BEST)
            return
        self.location.copy(whole, BEST)
        self.location.put_bytes(replace(best, name=BEST).dump(), sidecar_name(BEST))
        log.info("%s is %s again", BEST, best.name)

    def check_writable(self) -> None:
        """Fail now rather than at the first checkpoint; clear what a killed process left.

        Raises:
            StorageError: the location does not exist or may not be written.
        """
        self.location.check_writable()
        with os_errors("making", self._staging):
            self._staging.mkdir(parents=True, exist_ok=True)
        remove_abandoned_scratch(self._staging)

    def save(self, snapshot: Snapshot, names: Iterable[str]) -> None:
        """Queue a snapshot under its names; waits only while another one is still queued.

        Raises:
            LiquidError: an earlier snapshot could not be written.
        """
        if self._uploads is None:
            names_there = {entry.name for entry in self.location.list()}
            described = {name for name in names_there if sidecar_name(name) in names_there}
            self._names = described if self._goes_on else set()
            self._uploads = Uploader(self.location)
        self._uploads.wait_for_room(_IN_FLIGHT)
        staged = _Staged(snapshot, self.location, self._staging)
        order = {BEST: 1, FINAL: 2}
        written = sorted(dict.fromkeys(names), key=lambda name: order.get(name, 0))
        for name in written:
            pair = [name, sidecar_name(name)]
            key = BEST if name == BEST else None
            self._uploads.submit(pair, partial(staged.writes, name), key=key)
            self._names.add(name)
        for old in outdated(self._names, written):
            self._names.remove(old)
            self._uploads.submit_delete(sidecar_name(old))
            self._uploads.submit_delete(old)

    def rescue(self, reason: Exception) -> None:
        """For a run that ends badly: wait a while for what is queued, and log what is lost."""
        if self._uploads is None:
            return
        try:
            self._uploads.drain(RESCUE_SECONDS)
        except LiquidError as error:
            if error is not reason:
                log.warning("%s", error)
        self._uploads.close(0.0)
        self._uploads = None

    def finish(self) -> None:
        """Wait until everything queued is at the location.

        Raises:
            LiquidError: a snapshot could not be written.
        """
        if self._uploads is not None:
            self._uploads.drain()
            self._uploads.close()
            self._uploads = None
