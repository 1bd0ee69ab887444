"""What a command does when the platform tells it to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from trainer.runtime.log import log, rank_of_process, set_up_logging

SIGTERM_STATUS = 128 + signal.SIGTERM
"""The shell's convention for a process ended by a signal."""


def end_on_sigterm() -> None:
    """Let SIGTERM end this process in one line, with what is half-written cleaned up.

    The first process of a container would otherwise ignore it, and be killed some time later. The
    training loop has a handler of its own, which saves first. Where someone else handles or ignores
    the signal, and outside the main thread, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """As `end_on_sigterm`, for as long as the body runs."""
    before = signal.getsignal(signal.SIGTERM)
    end_on_sigterm()
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _end:
            signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if rank_of_process() == 0:
        if not log.handlers:
            set_up_logging()
        log.error("stopped by SIGTERM")
    # No Exception, so that nothing on the way takes it for a failure of its own
    raise SystemExit(SIGTERM_STATUS)
