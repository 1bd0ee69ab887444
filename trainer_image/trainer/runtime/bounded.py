"""Native code that parses foreign bytes, in a child process of bounded memory and time.

A crash there ends the child alone; its death, like its exceptions, is told in one line.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Self

from trainer.runtime import errors
from trainer.runtime.errors import LiquidError

GIB = 1 << 30

MEMORY = GIB
"""Bytes that a child may take above what it has once its libraries are loaded."""
SECONDS = 8
"""Of processor time, for a request."""

_SHOWN = 1000
"""Characters of a reason."""
_START_SECONDS = 120
_MOST_SECONDS = 86_400
_PATIENCE = 15
"""How many times a request's processor time may pass by the clock, on a busy machine."""


class BoundedError(Exception):
    """Why a child could not answer, in one line."""


class BoundedProcess:
    """A child process that answers requests with a function of bytes.

    Args:
        target: ``module:function``; the function takes and returns bytes.
        memory: bytes above what the child has after importing the module; three quarters of what
            the machine has to give if that is less.

    Raises:
        BoundedError: it does not start.
    """

    def __init__(self, target: str, *, memory: int = MEMORY) -> None:
        ours, theirs = Pipe()
        self._connection: Connection = ours
        self._memory = memory
        package = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, (package, environment.get("PYTHONPATH")))
        )
        # What a local file refers to is not fetched, and a token is of no use to a parser
        environment |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
        for name in ("HF_TOKEN", "PYTHONFAULTHANDLER"):
            environment.pop(name, None)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), target, str(memory)],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            self._receive(_START_SECONDS, "to start")
        except BaseException:  # a signal's too: the child must not stay
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, request: bytes, *, seconds: float = SECONDS) -> bytes:
        """The function's answer.

        Args:
            request: what it is called with.
            seconds: of processor time that it may take.

        Raises:
            BoundedError: the function raised, or the child took too much or crashed.
            LiquidError: the function raised this.
        """
        seconds = min(seconds, _MOST_SECONDS)
        try:
            self._connection.send_bytes(str(int(seconds)).encode())
            self._connection.send_bytes(request)
        except OSError:
            raise self._death(f"{seconds:.0f} s") from None
        return self._receive(seconds * _PATIENCE, f"{seconds:.0f} s of processor time")

    def _receive(self, patience: float, allowed: str) -> bytes:
        try:
            if not self._connection.poll(patience):
                self.close()
                raise BoundedError(f"reading it takes longer than {patience:.0f} s")
            reply = self._connection.recv_bytes()
        except (EOFError, OSError):
            raise self._death(allowed) from None
        if reply[:1] == b"+":
            return reply[1:]
        kind, text = json.loads(reply[1:])
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, LiquidError):
            raise known(text)
        if kind == "MemoryError":
            raise BoundedError(self._too_large())
        raise BoundedError(text or kind)

    def _death(self, allowed: str) -> BoundedError:
        self._connection.close()
        try:
            status = self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if status == -signal.SIGXCPU:
            return BoundedError(f"reading it takes more than {allowed}")
        if status in (-signal.SIGABRT, -signal.SIGKILL):
            # How Rust ends where it gets no memory, and how Linux ends a process
            return BoundedError(f"{self._too_large()}, or it is damaged")
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return BoundedError(f"what reads it crashed ({name}); it is damaged or nested too deeply")

    def _too_large(self) -> str:
        return f"reading it takes more than {self._memory / GIB:.1f} GiB of memory"

    def close(self) -> None:
        """End the child."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _limit(memory: int) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    status = Path("/proc/self/status")
    if status.exists():  # Linux alone tells, and limits private memory; mapped files do not count
        free = _kilobytes(Path("/proc/meminfo"), "MemAvailable:") * 3 // 4
        _lower(resource.RLIMIT_DATA, _kilobytes(status, "VmData:") + min(memory, max(free, MEMORY)))


def _kilobytes(path: Path, name: str) -> int:
    """A number of kB of one of the kernel's tables, in bytes."""
    return int(path.read_text(encoding="ascii").partition(name)[2].split()[0]) * 1024


def _allow_seconds(seconds: int) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime) + 1 + seconds)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _reply(function: Callable[[bytes], bytes], request: bytes) -> bytes:
    try:
        return b"+" + function(request)
    except BaseException as error:  # noqa: BLE001 - a panic of Rust is no Exception
        text = " ".join(str(error).split())[:_SHOWN]
        return b"-" + json.dumps([type(error).__name__, text]).encode()


def _serve(connection: Connection, function: Callable[[bytes], bytes]) -> None:
    connection.send_bytes(b"+")
    with suppress(EOFError, OSError):
        while True:
            _allow_seconds(int(connection.recv_bytes()))
            connection.send_bytes(_reply(function, connection.recv_bytes()))


def _main(descriptor: str, target: str, memory: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    module, _, name = target.partition(":")
    function: Any = getattr(importlib.import_module(module), name)
    _limit(int(memory))
    _serve(Connection(int(descriptor)), function)


if __name__ == "__main__":
    _main(*sys.argv[1:])
