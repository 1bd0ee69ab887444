"""Processes that a test interrupts."""

from __future__ import annotations

import signal


def with_interrupts() -> None:
    """For `Popen`'s ``preexec_fn``: a process that a shell's background starts ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
