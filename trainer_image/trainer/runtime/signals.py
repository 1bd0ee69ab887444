"""How a process ends when it is told to: by SIGTERM from a platform, by SIGINT from a person.

Python runs a signal's handler in the main thread between two instructions of its own: not while
native code runs; and what a handler raises may be swallowed by the callback of a library. So a
thread that the signal itself wakes ends the process for certain, when its time is over or at a
second signal.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from trainer.runtime.errors import signal_status
from trainer.runtime.log import flush_standard_streams, rank_of_process, write_last_line

SIGNALS = (signal.SIGTERM, signal.SIGINT)

GRACE_SECONDS = 25.0
"""How long a run may save and upload after a signal. Vertex AI and Kubernetes kill after 30 s."""

CLEANUP_SECONDS = 5.0
"""How long anything else may take to end after a signal."""

_AGAIN_SECONDS = 1.0
"""A signal so soon after the first is the same stop: told to a group of processes at once, and
once more to each of them by their launcher."""


_NOTICED_SECONDS = 0.05
"""In which the main thread notices a signal, if it is given to it and no native code runs."""


@dataclass(frozen=True)
class _Phase:
    """What a stop means for the part of a program that runs."""

    handle: Callable[[signal.Signals], None]
    """Called in the main thread."""
    seconds: float = CLEANUP_SECONDS
    """From the signal to the end of the process."""
    after_second: float = 0.0
    """From a second signal to the end of the process."""
    last_words: Callable[[], str] = str
    """Called before the process is ended with work left undone: says what, if anything."""


class _Watch:
    """The stop of this process, and the thread that sees to it."""

    def __init__(self) -> None:
        self.phase = _Phase(self.end_at_once)
        self.stop: signal.Signals | None = None
        self.told = False
        """Whether the log says so."""
        self.status: int | None = None
        """Of a command that has ended."""
        self._pipe: tuple[int, int] | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._unraisable: Any = None
        self._deadline = float("inf")
        self._first = float("inf")
        """When the first signal came; like the deadline, by `time.monotonic`."""
        self._reached = False
        """Whether the main thread has handled it."""

    # ── beginning and end ─────────────────────────────────────────────────────────────────────

    def start(self) -> bool:
        """Handle the signals that nobody handles or ignores; whether this call began it."""
        if self._pipe or threading.current_thread() is not threading.main_thread():
            return False
        defaults = (signal.SIG_DFL, signal.default_int_handler)
        for number in SIGNALS:
            if signal.getsignal(number) in defaults:
                self._handlers[number] = signal.signal(number, self._on_signal)
        if not self._handlers:
            return False
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        other = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        if other != -1:
            signal.set_wakeup_fd(other)  # somebody else's event loop is woken by signals
        threading.Thread(
            target=self._watch, args=(self._pipe,), name="signals", daemon=True
        ).start()
        # The first process of a container is started with them blocked: one that came meanwhile is
        # handled now
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return True

    def release(self) -> None:
        """Put everything back as it was before `start`."""
        if self._pipe is None:
            return
        current = signal.set_wakeup_fd(-1)
        if current != self._pipe[1]:
            signal.set_wakeup_fd(current)
        with _releasing:
            pipe, self._pipe = self._pipe, None
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)
        sys.unraisablehook = self._unraisable
        os.close(pipe[1])  # ends the thread
        self.__init__()  # type: ignore[misc]

    def forget_in_child(self) -> None:
        """After a fork: the pipe and its thread are the parent's, and so is who holds the lock."""
        global _releasing
        _releasing = threading.Lock()
        if self._pipe is not None:
            os.close(self._pipe[0])
            self.release()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    # ── in the main thread ────────────────────────────────────────────────────────────────────

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self._reached = self._reached, True
        self.stop = self.stop or signal.Signals(number)
        if not again and self.status is None:
            self.phase.handle(self.stop)

    def saw(self, number: signal.Signals) -> None:
        """Take note of a signal that another handler takes."""
        if self._pipe is not None:
            self.stop, self._reached = self.stop or number, True

    def _on_unraisable(self, what: Any) -> None:
        """End here where what the handler raised is about to be swallowed."""
        if self.stop and isinstance(what.exc_value, (SystemExit, KeyboardInterrupt)):
            self.end_at_once(self.stop)
        self._unraisable(what)

    def raise_for(self, number: signal.Signals) -> NoReturn:
        """Say so, and unwind with what is no Exception, so that nothing takes it for a failure."""
        self.tell()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(signal_status(number))

    def end_at_once(self, number: signal.Signals) -> NoReturn:
        """Say so and end, with nothing to clean up."""
        self.tell()
        os._exit(signal_status(number))

    def tell(self, more: str = "") -> None:
        """Say once that the process was stopped."""
        if self.stop is None or self.told:
            return
        self.told = True
        if rank_of_process() == 0:
            words = "interrupted" if self.stop == signal.SIGINT else f"stopped by {self.stop.name}"
            write_last_line(f"{words}{'; ' * bool(more)}{more}")

    # ── in the watching thread ────────────────────────────────────────────────────────────────

    def _watch(self, pipe: tuple[int, int]) -> None:
        while True:
            with _releasing:
                released = self._pipe is not pipe
                left = self._deadline - time.monotonic()
            if not released and left <= 0:
                self._end()
            wait = None if released or left == float("inf") else left
            ready, _, _ = select.select([pipe[0]], [], [], wait)
            if not ready:
                continue
            numbers = os.read(pipe[0], 64)
            if not numbers:
                os.close(pipe[0])
                return
            for number in numbers:
                if number in SIGNALS:
                    self._note(signal.Signals(number), pipe)

    def _note(self, number: signal.Signals, pipe: tuple[int, int]) -> None:
        now = time.monotonic()
        with _releasing:
            if self._pipe is not pipe:
                return
            self.stop = self.stop or number
            first = self._first == float("inf")
            if first:
                self._first, self._deadline = now, now + self.phase.seconds
            elif now - self._first > _AGAIN_SECONDS:
                self._deadline = min(self._deadline, now + self.phase.after_second)
        if first:
            time.sleep(_NOTICED_SECONDS)
            with _releasing:
                # Where the system has given the signal to another thread, main has not woken
                if self._pipe is pipe and not self._reached:
                    signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _end(self) -> NoReturn:
        # In a thread of its own: a reader of the log that has stopped must not keep the process
        speaker = threading.Thread(
            target=lambda: self.tell(self.phase.last_words()), name="last words", daemon=True
        )
        if self.status is None:
            speaker.start()
            speaker.join(1.0)
        os._exit(signal_status(self.stop or 0) if self.status is None else self.status)


_releasing = threading.Lock()
"""Held while the watch is given up, and while its thread acts on it."""

_watch = _Watch()
os.register_at_fork(
    # A signal that comes in between would be lost: its handler is the parent's
    before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
    after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
    after_in_child=_watch.forget_in_child,
)


def watch_signals() -> None:
    """Let SIGTERM and SIGINT end this process, from here on to its end, in one line.

    A program calls it before it imports anything that takes a while: until then the first process
    of a container ignores SIGTERM, unless it was started with the signal blocked, which then waits
    for this call. Where somebody else handles or ignores a signal, and outside of
    the main thread, nothing changes.
    """
    if _watch.start():
        # Registered first, it comes last; behind it the interpreter takes the handlers away, long
        # before it has ended
        atexit.register(_leave)


def _leave() -> None:
    if _watch.status is not None:
        flush_standard_streams()
        os._exit(_watch.status)


def release_signals() -> None:
    """Take back `watch_signals` or `end_on_signals`."""
    atexit.unregister(_end_if_stopped)
    atexit.unregister(_leave)
    _watch.release()


def end_on_signals() -> None:
    """As `watch_signals`, where the rest of the program is another's: what it began is cleaned up.

    A stop that something on the way has swallowed ends the process nevertheless, and never with 0.
    """
    if _watch.start():
        atexit.register(_end_if_stopped)
        _watch.phase = _Phase(_watch.raise_for)


def _end_if_stopped() -> None:
    if _watch.stop and _watch.status is None:
        _watch.end_at_once(_watch.stop)


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """As `end_on_signals`, for as long as the body runs."""
    began = _watch.start()
    try:
        with _phase(_Phase(_watch.raise_for)):
            yield
    finally:
        if began:
            _watch.release()


@contextlib.contextmanager
def ending_first(
    end: Callable[[], None],
    kill: Callable[[], None],
    *,
    seconds: float,
    after_second: float = 0.0,
) -> Iterator[None]:
    """While the body runs, a stop ends other processes first.

    Args:
        end: asks them to end and waits for them.
        kill: called before this process is ended for certain; must not wait.
        seconds: how long all of it may take.
        after_second: how much of it is left after a second signal.
    """

    def handle(number: signal.Signals) -> None:
        end()
        _watch.raise_for(number)

    def last_words() -> str:
        kill()
        return ""

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with _phase(_Phase(handle, seconds, after_second, last_words)):
            yield
    finally:
        for number, handler in before.items():  # torchrun leaves its own behind
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextlib.contextmanager
def saving_on_signals(
    handle: Callable[[signal.Signals], None], unsaved: Callable[[], str]
) -> Iterator[None]:
    """While the body runs, a stop does nothing but to call `handle`; the body ends by itself.

    Where `watch_signals` was called, the process is ended for certain after `GRACE_SECONDS`.

    Args:
        handle: called with the signal.
        unsaved: says what a process that is ended for certain leaves unsaved.

    Raises:
        SystemExit: a stop before this one was swallowed.
    """
    before: dict[signal.Signals, Any] = {}
    if _watch.stop:
        raise SystemExit(signal_status(_watch.stop))

    def on_signal(number: int, frame: FrameType | None) -> None:
        _watch.saw(signal.Signals(number))
        handle(signal.Signals(number))

    try:
        with _phase(_Phase(handle, GRACE_SECONDS, last_words=unsaved)):
            for number in SIGNALS:
                before[number] = signal.signal(number, on_signal)
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _phase(phase: _Phase) -> Iterator[None]:
    before, _watch.phase = _watch.phase, phase
    try:
        yield
    finally:
        _watch.phase = before


def tell_otherwise() -> bool:
    """Whether the log says already that this process was stopped; from now on the caller does."""
    told, _watch.told = _watch.told, True
    return told


def end_with(status: int) -> int:
    """The status that a command ends with, given its own: a stop never ends with 0.

    A signal after this changes nothing, but that it may not take long any more.
    """
    if _watch.stop and status == os.EX_OK:
        _watch.tell()
        status = signal_status(_watch.stop)
    _watch.status = status
    return status
