"""Log lines: plain text, with a progress bar on a terminal; JSON objects for Cloud Logging.

``LOG_FORMAT`` asks for ``json`` or ``text``. Without it, lines are JSON where a platform collects
them, as its variables tell, and no person watches.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import trainer
from trainer.runtime.errors import LiquidError, Preempted, UsageError, signal_status
from trainer.runtime.messages import brief
from trainer.runtime.strict_json import dumps

log = logging.getLogger("trainer")

FORMAT = "LOG_FORMAT"
"""The variable of the environment that asks for a form of the log's lines."""
JSON, TEXT = "json", "text"
_PLATFORMS = re.compile(r"CLOUD_ML_JOB_ID|AIP_\w+|KUBERNETES_SERVICE_HOST")
"""Variables that Vertex AI and Kubernetes set in what they run."""

_secrets: set[str] = set()


def hide(secret: str) -> None:
    """Replace this text by ``***`` in everything that is logged from now on."""
    if secret:
        _secrets.add(secret)


_TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}"
    # long and of all sorts of characters, as no name, path or digest is
    r"|(?<![A-Za-z0-9])(?=[A-Z0-9]*[a-z])(?=[a-z0-9]*[A-Z])(?=[A-Za-z]*[0-9])[A-Za-z0-9]{24,}"
    # a user's name and password in an address
    r"|(?<=://)[^\s/@'\"]+(?=@)"
)
"""What looks like a token, whoever's and wherever it stands."""


def without_secrets(text: str) -> str:
    """The text with every hidden secret replaced, and what looks like one."""
    for secret in _secrets:
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


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

        with _unless_gone(), tqdm.external_write_mode(file=self.stream, nolock=False):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what has happened, for `emit`; logging would print it, also to a closed stream."""
        raise


@contextlib.contextmanager
def _unless_gone() -> Iterator[None]:
    """A stderr that is closed, full or without a reader ends no run; nowhere could one say so."""
    try:
        yield
    except OSError:
        return
    except ValueError as error:
        if "closed file" not in str(error):
            raise


def open_standard_streams() -> None:
    """Let what was closed at the start be the null device.

    The next file opened would else get its number, and then what native code prints.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115


def flush_standard_streams() -> None:
    """Write out what stdout and stderr hold back; what cannot be is dropped.

    At its end the interpreter would try again, and end with status 120.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def on_terminal() -> bool:
    """Whether a person watches stderr."""
    return sys.stderr.isatty()


def log_format(environ: Mapping[str, str] = os.environ) -> str:
    """Which form the log's lines have: `JSON` or `TEXT`."""
    asked = environ.get(FORMAT, "")
    if asked in (JSON, TEXT):
        return asked
    collected = not os.isatty(2) and any(_PLATFORMS.fullmatch(name) for name in environ)
    return JSON if collected else TEXT


class ProgressBar:
    """tqdm's, on a terminal; one that cannot be drawn any more is left out.

    Args:
        what: is being done.
        unit: of what is counted.
        total: how many there are in all, where one knows.
        initial: how many are done.
        shown: False for none at all, as also where nobody watches.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        initial: int = 0,
        *,
        shown: bool = True,
    ) -> None:
        from tqdm import tqdm

        self._bar: tqdm[Any] | None = None
        if shown and on_terminal():
            with _unless_gone():
                self._bar = tqdm(total=total, initial=initial, desc=what, unit=unit, leave=False)

    def update(self, number: int = 1, note: str = "") -> None:
        """So many more are done; the note stands behind how long is left."""
        if self._bar is not None:
            with _unless_gone():
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(number)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            with _unless_gone():
                self._bar.close()


def write_last_line(message: str) -> None:
    """A line of the log, written past all locks and buffers: as a signal's handler must."""
    formatter = _formatter()
    record = logging.LogRecord(log.name, logging.ERROR, "", 0, message, None, None)
    with contextlib.suppress(OSError):
        os.write(2, f"{formatter.format(record)}\n".encode())


def rank_of_process() -> int:
    """This process's number as torchrun gives it; 0 alone."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


def _formatter() -> logging.Formatter:
    return _JsonFormatter() if log_format() == JSON else _TextFormatter()


def set_up_logging(*, rank: int = 0) -> None:
    """Log to stderr; processes other than rank 0 log warnings only.

    Raises:
        UsageError: ``LOG_FORMAT`` is of no known form.
    """
    _log_to_stderr(logging.INFO if rank == 0 else logging.WARNING)
    asked = os.environ.get(FORMAT, "")
    if asked not in (JSON, TEXT, ""):
        raise UsageError(f"{FORMAT}={brief(asked)}: choose one of {JSON}, {TEXT}")


def _log_to_stderr(level: int) -> None:
    handler = _AboveProgressBar(sys.stderr)
    handler.setFormatter(_formatter())
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(level)


_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notices out of the log.

    Those that are not imported yet are told by the environment: not every command needs them.
    """
    os.environ.update(_QUIET)
    if transformers := sys.modules.get("transformers"):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    if datasets := sys.modules.get("datasets"):
        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
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
        _log_to_stderr(logging.INFO)
    if isinstance(error, KeyboardInterrupt):
        log.error("interrupted")
        return signal_status(signal.SIGINT)
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
    if isinstance(error, MemoryError):
        return f"out of memory{': ' * bool(first)}{first}"
    return ""
