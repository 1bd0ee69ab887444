"""Log lines: JSON objects for Cloud Logging, plain text and a progress bar on a terminal."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
from typing import Any

import trainer
from trainer.runtime.errors import LiquidError, Preempted
from trainer.runtime.strict_json import dumps

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
        return without_secrets(dumps(payload))


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


def rank_of_process() -> int:
    """This process's number as torchrun gives it; 0 alone."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


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
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


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
    if isinstance(error, Preempted) and rank_of_process() > 0:
        return error.exit_status  # rank 0 says it for all
    if isinstance(error, LiquidError):
        log.error("%s", " ".join(str(error).split()))
        return error.exit_status
    if isinstance(error, BrokenPipeError):
        # The reader of our output went away; keep the interpreter from failing again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if reason := _reason(error):
        log.error("%s", reason)
        return 1
    log.error("unexpected failure: %s", "".join(traceback.format_exception(error)).rstrip())
    return 1


def _reason(error: BaseException) -> str:
    """One line for what the machine refused; empty for anything else."""
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)!r}: {error.strerror}; give another place"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({first}); free some space or give another place"
    # torch's own type is not imported for its name; on the CPU it raises a RuntimeError
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in first:
        return (
            f"out of memory: {first.partition('. ')[0]}; give a smaller --micro_batch, or"
            " --micro_batch=auto, --activation_checkpointing, or a smaller model"
        )
    if isinstance(error, RuntimeError) and "home directory" in first:
        return f"{first} Write the path out instead of ~NAME"
    if isinstance(error, MemoryError):
        return f"out of memory{': ' * bool(first)}{first}"
    return ""
