"""How a command or a stage begins and ends: its log, its signals, its exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from trainer.runtime.log import quiet_libraries, report_failure, set_up_logging
from trainer.runtime.signals import end_on_sigterm, ending_on_sigterm


def start_stage() -> None:
    """Set up what a stage wants that another program calls in process.

    A failure that nobody catches ends the process as it ends a command: in one line of the log,
    with its exit status. Cloud Logging would make an entry of each line of a traceback. SIGTERM
    ends it too.
    """
    set_up_logging()
    end_on_sigterm()
    quiet_libraries()
    sys.excepthook = _report_and_exit


def _report_and_exit(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    raise SystemExit(report_failure(error))


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run a command's body; turn its failure into one line on stderr and an exit status."""
    try:
        with ending_on_sigterm():
            command(sys.argv[1:] if argv is None else argv)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - reported, or raised again
        return report_failure(error)
    return os.EX_OK
