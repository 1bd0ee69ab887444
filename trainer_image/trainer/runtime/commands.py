"""How a command or a stage begins and ends: its log, its signals, its exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from trainer.runtime.errors import signal_status
from trainer.runtime.homes import find_home
from trainer.runtime.log import (
    flush_standard_streams,
    open_standard_streams,
    quiet_libraries,
    report_failure,
    set_up_logging,
)
from trainer.runtime.signals import (
    end_on_signals,
    end_with,
    ending_on_signals,
    tell_otherwise,
)


def start_stage() -> None:
    """Set up what a stage wants that another program calls in process.

    A failure that nobody catches ends the process as it ends a command: in one line of the log,
    with its exit status. Cloud Logging would make an entry of each line of a traceback. SIGTERM
    ends it too.

    Called before anything is imported that takes a while, signals being handled from here on.
    """
    open_standard_streams()
    set_up_logging()
    end_on_signals()
    sys.excepthook = _report_and_exit
    find_home()
    quiet_libraries()


def _report_and_exit(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    raise SystemExit(end_with(_report(error)))


def _report(error: BaseException) -> int:
    told = tell_otherwise()
    if isinstance(error, KeyboardInterrupt) and told:
        return signal_status(signal.SIGINT)
    return report_failure(error)


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run a command's body; turn its failure into one line on stderr and an exit status."""
    open_standard_streams()
    with ending_on_signals():
        try:
            find_home()
            command(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
            status = os.EX_OK
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - reported, or raised again
            status = _report(error)
        except SystemExit as end:  # --help, or a stop
            end_with(end.code if isinstance(end.code, int) else os.EX_OK)
            raise
        status = end_with(status)
        flush_standard_streams()
    return status
