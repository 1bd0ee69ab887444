"""Following a run to its end: what the two kinds of servers have in common."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

PATIENCE = 10
"""Looks at a run that may fail one after another before it is no longer followed."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the following, and says that it ends nothing else."""
    try:
        yield
    except KeyboardInterrupt:
        print("no longer followed; the run goes on", file=sys.stderr)
        raise
