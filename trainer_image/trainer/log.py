"""Log lines: JSON objects for Cloud Logging, plain text and a progress bar on a terminal."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from typing import Any

import trainer
from trainer.errors import LiquidError

log = logging.getLogger("trainer")
_secrets: set[str] = set()


def hide(secret: str) -> None:
    """Replace this text by ``***`` in everything that is logged from now on."""
    if secret:
        _secrets.add(secret)


def without_secrets(text: str) -> str:
    """The text with every hidden secret replaced."""
    for secret in _secrets:
        text = text.replace(secret, "***")
    return text


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, with the keys that Cloud Logging reads.

    See https://cloud.google.com/logging/docs/structured-logging: ``severity``, ``message`` and
    ``time`` are special; the others become fields of the payload.
    """

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        payload = {
            "severity": record.levelname,
            "message": _message(self, record),
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            **getattr(record, "values", {}),
        }
        return without_secrets(json.dumps(payload, default=str, ensure_ascii=False))


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f"{record.levelname} "
        return without_secrets(f"{stamp} {level}{_message(self, record)}")


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + formatter.formatException(record.exc_info)
    return message


class _AboveProgressBar(logging.StreamHandler):
    """Writes without tearing a tqdm bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream, nolock=False):
            super().emit(record)


def on_terminal() -> bool:
    """Whether a person watches stderr."""
    return sys.stderr.isatty()


def set_up_logging(*, rank: int = 0) -> None:
    """Log to stderr; processes other than rank 0 log warnings only."""
    handler = _AboveProgressBar(sys.stderr)
    handler.setFormatter(_TextFormatter() if on_terminal() else _JsonFormatter())
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notices out of the log."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # transformers' loading bars come through tqdm's own switch in some releases
    logging.getLogger("httpx").setLevel(logging.WARNING)


def start() -> None:
    """Set up what a stage wants that another program calls in process.

    A failure that nobody catches ends the process as it ends a command: in one line of the log,
    with its exit status. Cloud Logging would make an entry of each line of a traceback.
    """
    set_up_logging()
    quiet_libraries()
    sys.excepthook = _report_and_exit


def _report_and_exit(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    raise SystemExit(report_failure(error))


def seconds_since_start() -> float:
    """Seconds since the package was imported, before torch and the others were."""
    return time.monotonic() - trainer.STARTED


def log_values(message: str, **values: Any) -> None:
    """Log a line whose numbers are also fields of the JSON payload."""
    log.info(message, extra={"values": values})


def report_failure(error: BaseException) -> int:
    """One line for a failure the user can act on; the traceback only for a defect of ours."""
    if not log.handlers:
        set_up_logging()
    if isinstance(error, KeyboardInterrupt):
        log.error("interrupted")
        return 130
    if isinstance(error, LiquidError):
        log.error("%s", " ".join(str(error).split()))
        return error.exit_status
    if isinstance(error, BrokenPipeError):
        # The reader of our output went away; keep the interpreter from failing again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    log.error("unexpected failure: %s", "".join(traceback.format_exception(error)).rstrip())
    return 1
