"""Compiled code that a run takes over from an earlier one, and leaves to later ones.

It is code, and no checkpoint: what it holds is run. So a run takes it from two places alone. One is
``--compile_cache``, which the user vouches for. The other is the run's own output, if the snapshot
that the run goes on from has the file's SHA-256, and if no other user of this machine could have
written it there. What lies beside a checkpoint from elsewhere is never read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoints.names import COMPILE_CACHE
from trainer.checkpoints.snapshots import Snapshots
from trainer.runtime.ahead import Ahead
from trainer.runtime.compiled_code import LIMIT, UnusableError, collect, use, watch_triton
from trainer.runtime.errors import LiquidError
from trainer.runtime.log import log
from trainer.runtime.messages import one_line
from trainer.settings.config import NO_COMPILE_CACHE, TrainConfig
from trainer.storage.base import StorageMissingError
from trainer.storage.files import in_home
from trainer.storage.places import is_remote, read_bytes
from trainer.training.precision import Precision


@dataclass(frozen=True)
class _Found:
    """A file that may be used."""

    uri: str
    data: bytes
    own: bool
    """Whether it is the one at the run's output."""


class CompileCache:
    """The compiled code of a run: begun with, and kept.

    Files are read in the background; `use` puts the first that fits where compilers find it.

    Args:
        config: may name a file, or switch all of this off.
        precision: device that code is for, and whether the run compiles at all.
        snapshots: of the run.
        digest: SHA-256 of the file at the run's output, as the snapshot that the run goes on from
            has it; None where there is none.
    """

    def __init__(
        self, config: TrainConfig, precision: Precision, snapshots: Snapshots, digest: str | None
    ) -> None:
        self._device = precision.device
        self._snapshots = snapshots
        self._known: frozenset[str] | None = None
        self._wanted = config.compile_cache != NO_COMPILE_CACHE and precision.compiles(config)
        if not self._wanted:
            return
        if self._device.type == "cuda":
            watch_triton(self._device)
        self._files = Ahead("compiled code", lambda: list(_find(config, snapshots, digest)))

    def use(self) -> None:
        """Use the first file that fits; the run goes on without, where there is none.

        Called before anything is compiled.
        """
        for file in self._files.result() if self._wanted else []:
            try:
                kernels = use(file.data, self._device)
            except (UnusableError, OSError) as error:
                _say(file.uri, str(error))
                continue
            if file.own:
                self._known = kernels
                self._snapshots.compiled = hashlib.sha256(file.data).hexdigest()
            log.info("using the compiled code of %s: %.1f MB", file.uri, len(file.data) / 1e6)
            return

    def keep(self) -> None:
        """Queue what this process has used for the run's output, once.

        Called when all that a run compiles has been compiled.
        """
        wanted, self._wanted = self._wanted, False
        try:
            make = collect(self._device, self._known) if wanted else None
        except Exception as error:  # noqa: BLE001 - compilers raise many kinds, and none matters
            log.warning("the compiled code is not kept: %s", one_line(error))
            return
        if make is not None:
            self._snapshots.keep_compiled(make)


def _find(config: TrainConfig, snapshots: Snapshots, digest: str | None) -> Iterator[_Found]:
    """The files that a run may use, the best first; a line of the log for each that it may not."""
    if digest is not None:
        uri = snapshots.location.child(COMPILE_CACHE)
        data = _read(uri)
        if data is not None and (reason := _distrusted(uri, data, digest)):
            _say(uri, reason)
        elif data is not None:
            yield _Found(uri, data, True)
    if config.compile_cache:
        data = _read(config.compile_cache)
        if data is not None:
            yield _Found(config.compile_cache, data, False)


def _read(uri: str) -> bytes | None:
    try:
        return read_bytes(uri, limit=LIMIT)
    except StorageMissingError:
        log.info("there is no compiled code at %s", uri)
    except LiquidError as error:
        _say(uri, str(error))
    return None


def _say(uri: str, reason: str) -> None:
    log.warning("the compiled code of %s is not used: %s", uri, " ".join(reason.split()))


def _distrusted(uri: str, data: bytes, digest: str) -> str:
    """Why a file at the run's output is not taken for the run's own; empty where it is."""
    if hashlib.sha256(data).hexdigest() != digest:
        return "it is not the one that the run's snapshot names"
    if is_remote(uri):
        return ""
    path = Path(in_home(uri))
    for each in (path, path.parent):
        status = each.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002:
            return f"another user may have written {each}; name it by --compile_cache to trust it"
    return ""
