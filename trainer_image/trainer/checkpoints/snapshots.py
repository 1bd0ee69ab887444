"""A run's checkpoints at its output location: found again at a start, written in the background."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from trainer.checkpoints.checkpoint import Checkpoint, Snapshot
from trainer.checkpoints.metadata import NewerFormatError, run_settings_of
from trainer.checkpoints.names import (
    BEST,
    COMPILE_CACHE,
    FINAL,
    SIDECAR_SUFFIX,
    is_best_of,
    is_checkpoint_name,
    outdated,
    outdated_at,
    sidecar_name,
)
from trainer.checkpoints.reading import open_checkpoint, read_checkpoint, read_open_checkpoint
from trainer.checkpoints.sidecar import (
    SIDECAR_LIMIT,
    Sidecar,
    read_sidecars,
    read_sidecars_of,
    verify_file,
    without_sidecar,
)
from trainer.runtime.errors import CheckpointError, LiquidError, UsageError
from trainer.runtime.log import log
from trainer.storage.base import Entry, Location, StorageMissingError
from trainer.storage.digests import as_crc32c
from trainer.storage.files import crc32c_of, os_errors
from trainer.storage.places import fetch, open_location, split_uri, working_directory
from trainer.storage.scratch import remove_abandoned_scratch, scratch_directory
from trainer.storage.uploads import Uploader, Write

RESCUE_SECONDS = 600.0

_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
"""Bytes of this machine, more than which no checkpoint that it can use has."""

_IN_FLIGHT = 8
"""Files and removals that may still be queued when a new snapshot comes: those of about one."""


def _without_weights(names: set[str]) -> dict[str, str]:
    """Checkpoints of which there is only a sidecar, which no kill leaves, and what to say."""
    lost = {}
    for name in sorted(name.removesuffix(SIDECAR_SUFFIX) for name in names):
        if is_checkpoint_name(name) and name not in names:
            lost[name] = f"{name} does not exist, though its sidecar does"
            log.warning("%s", lost[name])
    return lost


def _describe(location: Location, name: str, workdir: Path) -> tuple[Checkpoint, Sidecar]:
    """A checkpoint that has no sidecar, and one for it.

    Raises:
        CheckpointError: it cannot be read, or is not whole by the sums inside it.
        StorageError: it cannot be fetched.
    """
    uri = location.child(name)
    with scratch_directory("fetch", workdir) as scratch:
        path, crc32c = fetch(uri, Path(scratch), limit=_MEMORY)
        with open_checkpoint(path, uri) as file:
            checkpoint = read_open_checkpoint(file, uri)
            with os_errors("reading", uri), zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            size, crc32c = os.fstat(file.fileno()).st_size, crc32c or crc32c_of(file)
        if damaged is not None:
            raise CheckpointError(f"{uri} is damaged: {damaged} in it is not what was written")
        sidecar = Sidecar(name, size, crc32c, checkpoint.meta)
    return checkpoint, sidecar


def _check_run(sidecar: Sidecar, run: Checkpoint) -> None:
    """Check that a checkpoint is of the run that another one is of.

    Raises:
        CheckpointError: it is of another run, or of none.
    """
    one, other = run_settings_of(sidecar.meta), run_settings_of(run.meta)
    # Releases differ in the settings that they know
    if any(one[name] != other[name] for name in one.keys() & other.keys()):
        raise CheckpointError("it is of another run")


def _check_final(sidecar: Sidecar) -> None:
    """Check that a final checkpoint is at the end of its run.

    Raises:
        CheckpointError: it is another checkpoint under that name.
    """
    end = sidecar.meta.get("train_steps", sidecar.step)
    if sidecar.name == FINAL and sidecar.step != end:
        raise CheckpointError(
            f"{FINAL} is at step {sidecar.step} of {end}: somebody gave that name to another"
            " checkpoint; move it away"
        )


def _foreign(uri: str, reason: Exception) -> CheckpointError:
    return CheckpointError(
        f"{uri} has no sidecar and is no snapshot of this run ({reason}); give another"
        " --output_gcs_uri or --local_workdir"
    )


def read_verified(location: Location, sidecar: Sidecar, workdir: Path) -> Checkpoint:
    """The checkpoint a sidecar names, checked against it.

    Raises:
        CheckpointError: it does not match its sidecar, or cannot be read.
        StorageError: it cannot be fetched.
    """
    uri = location.child(sidecar.name)
    with scratch_directory("fetch", workdir) as scratch:
        path, crc32c = fetch(uri, Path(scratch), limit=_MEMORY)
        with open_checkpoint(path, uri) as file:
            verify_file(file, sidecar, crc32c)
            checkpoint = read_open_checkpoint(file, uri)
    if checkpoint.step != sidecar.step:
        raise CheckpointError(
            f"{uri} is at step {checkpoint.step}, but its sidecar says {sidecar.step}"
        )
    return replace(checkpoint, digest=sidecar.digest)


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
        path, crc32c = fetch(uri, Path(scratch), limit=_MEMORY)
        checkpoint = read_checkpoint(path, uri)
        return replace(checkpoint, digest=as_crc32c(crc32c or crc32c_of(path)))


class _Staged:
    """A snapshot on its way: written and sent once, then copied to its further names."""

    def __init__(
        self,
        snapshot: Snapshot,
        location: Location,
        directory: Path,
        compiled: Callable[[], str | None],
    ) -> None:
        self._snapshot: Snapshot | None = snapshot
        self._compiled = compiled
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
        self._location.claim()
        if (digest := self._compiled()) is not None:
            self._meta["compiled"] = digest
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
        self._step = 0
        """Of the newest checkpoint that was found."""
        self.compiled: str | None = None
        """SHA-256 of the run's compiled code at the location, which snapshots name."""
        self._undescribed: list[Sidecar] = []
        """Of the run's whole checkpoints those that had no sidecar, and one for each."""

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are logged and passed over. None: no run yet.

        A kill leaves weights without a sidecar, and sidecars can get lost. Where such weights are
        whole they count too; `check_writable` and `mend` write their sidecars again.

        Raises:
            CheckpointError: there are snapshots, but none can be used, or there is somebody's
                checkpoint that is of no run; a run that started would do so on top of them.
            StorageError: the location or this machine keeps one from being read.
        """
        names = {entry.name for entry in self.location.list()}
        candidates, unreadable = read_sidecars_of(self.location, names)
        with os_errors("making", self.workdir):
            self.workdir.mkdir(parents=True, exist_ok=True)
        remove_abandoned_scratch(self.workdir)
        refused: dict[str, str] = {}
        found = self._newest_of(candidates, refused)
        refused |= unreadable | _without_weights(names)
        found = self._newest_without_sidecar(without_sidecar(names), found, refused)
        if found is None and refused:
            listed, newest = ", ".join(refused), next(iter(refused.values()))
            raise CheckpointError(
                f"{self.uri} holds snapshots of a run, but none can be used ({listed}): {newest};"
                " put a whole one there, or give another --output_gcs_uri or --local_workdir to"
                " start over"
            )
        if found is not None:
            self._goes_on, self._step = True, found.step
        return found

    def _newest_of(self, candidates: list[Sidecar], refused: dict[str, str]) -> Checkpoint | None:
        """The newest whole checkpoint with a sidecar; those that are not go into ``refused``."""
        candidates.sort(key=lambda sidecar: (sidecar.step, sidecar.name == FINAL), reverse=True)
        for sidecar in candidates:
            try:
                _check_final(sidecar)
                return read_verified(self.location, sidecar, self.workdir)
            except NewerFormatError:
                raise
            except (CheckpointError, StorageMissingError) as error:
                log.warning("%s; the next newest is tried", error)
                refused[sidecar.name] = str(error)
        return None

    def _newest_without_sidecar(
        self, names: list[str], found: Checkpoint | None, refused: dict[str, str]
    ) -> Checkpoint | None:
        """What was found, or a newer checkpoint of these names.

        Every one that can be read must be of one run. The base package's have the same names, and
        would be overwritten.
        """
        self._undescribed = []
        unreadable: list[CheckpointError] = []
        for name in names:
            uri = self.location.child(name)
            try:
                checkpoint, sidecar = _describe(self.location, name, self.workdir)
                run = checkpoint if found is None else found
            except NewerFormatError:
                raise
            except StorageMissingError:
                continue  # removed meanwhile
            except CheckpointError as error:
                log.warning("%s has no sidecar and is passed over: %s", uri, error)
                unreadable.append(_foreign(uri, error))
                continue
            try:
                _check_run(Sidecar.parse(sidecar.dump(), name), run)
            except (CheckpointError, UsageError) as error:
                raise _foreign(uri, error) from None
            try:
                _check_final(sidecar)
            except CheckpointError as error:
                log.warning("%s; it is passed over", error)
                refused[name] = str(error)
                continue
            self._undescribed.append(sidecar)
            if found is None or (checkpoint.step, name == FINAL) > (found.step, False):
                found = checkpoint
        if found is None and unreadable and not refused:
            raise unreadable[0]
        return found

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
        if rolling is not None and rolling.step >= step:
            return
        if best is None:
            held = "there is none" if rolling is None else f"{BEST} is of step {rolling.step}"
            log.warning(
                "the best checkpoint, of step %d, is gone from %s; %s", step, self.uri, held
            )
            return
        whole = self.location.stat(best.name, checksum=True)
        if (whole.size, whole.crc32c) != (best.size, best.crc32c):
            log.warning("%s is not what its sidecar says, so %s is left as it is", best.name, BEST)
            return
        self.location.claim()
        self.location.copy(whole, BEST)
        self.location.put_bytes(replace(best, name=BEST).dump(), sidecar_name(BEST))
        log.info("%s is %s again", BEST, best.name)

    def check_writable(self) -> None:
        """Fail now rather than at the first checkpoint; clear what a killed process left.

        Raises:
            StorageError: the location does not exist or may not be written, or another job writes
                there.
        """
        self.location.check_writable()
        self.location.claim()
        with os_errors("making", self._staging):
            self._staging.mkdir(parents=True, exist_ok=True)
        remove_abandoned_scratch(self._staging)
        self.mend()

    def mend(self) -> None:
        """Write the sidecars that whole checkpoints of the run lack.

        Those that retention would have removed by now are what a kill between the removal of
        sidecar and weights leaves, and are removed.

        Raises:
            StorageError: the location may not be written, or another job writes there.
        """
        if not self._undescribed:
            return
        self.location.claim()
        names = {entry.name for entry in self.location.list()}
        lacking = {sidecar.name for sidecar in self._undescribed}
        old = outdated_at((names & lacking) | (names - set(without_sidecar(names))), self._step)
        for sidecar in self._undescribed:
            uri = self.location.child(sidecar.name)
            if sidecar.name in old:
                log.info("removing %s, which a killed process was about to remove", uri)
                self.location.delete(sidecar.name)
            else:
                log.warning("%s had lost its sidecar; it is whole, and has one again", uri)
                self.location.put_bytes(sidecar.dump(), sidecar_name(sidecar.name))
        self._undescribed = []

    def save(self, snapshot: Snapshot, names: Iterable[str]) -> None:
        """Queue a snapshot under its names; waits only while another one is still queued.

        Raises:
            LiquidError: an earlier snapshot could not be written.
        """
        uploads = self._open_uploads()
        uploads.wait_for_room(_IN_FLIGHT)
        staged = _Staged(snapshot, self.location, self._staging, lambda: self.compiled)
        order = {BEST: 1, FINAL: 2}
        written = sorted(dict.fromkeys(names), key=lambda name: order.get(name, 0))
        for name in written:
            pair = [name, sidecar_name(name)]
            key = BEST if name == BEST else None
            uploads.submit(pair, partial(staged.writes, name), key=key)
            self._names.add(name)
        for old in outdated(self._names, written):
            self._names.remove(old)
            uploads.submit_delete(sidecar_name(old))
            uploads.submit_delete(old)

    def keep_compiled(self, make: Callable[[], bytes]) -> None:
        """Queue the run's compiled code; a failure to write it is logged, and no more.

        Args:
            make: its bytes; called in the uploads' thread.

        Raises:
            LiquidError: an earlier snapshot could not be written.
        """

        def write(name: str) -> Entry:
            data = make()
            self.location.claim()
            self.compiled = None
            written = self.location.put_bytes(data, name)
            self.compiled = hashlib.sha256(data).hexdigest()
            return written

        self._open_uploads().submit_extra(COMPILE_CACHE, write)

    def keep(self, name: str, write: Write) -> None:
        """Queue a file that every snapshot saved afterwards depends on.

        Args:
            name: what it is called beside the snapshots.
            write: writes it; called in the uploads' thread.

        Raises:
            LiquidError: an earlier snapshot or file could not be written.
        """
        self._open_uploads().submit([name], lambda: [write], told=False)

    def _open_uploads(self) -> Uploader:
        if self._uploads is None:
            names_there = {entry.name for entry in self.location.list()}
            described = {name for name in names_there if sidecar_name(name) in names_there}
            self._names = described if self._goes_on else set()
            self._uploads = Uploader(self.location)
        return self._uploads

    def unsent(self) -> list[str]:
        """What is queued, and not at the location yet."""
        uploads = self._uploads
        return uploads.unsent() if uploads is not None else []

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
