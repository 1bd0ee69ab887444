"""SIGTERM to a training in the image: at its start, in training, while it saves.

Each time it must end with 143 and one line, and the same command must go on to the very weights of
a run that nobody stopped.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.image.stages import Site, Started, Task, told_to

STOPPED = 143
WayToStop = Callable[[Started], None]
"""Waits for the moment and sends the signal."""
_TRIES = 200
_GOING_ON = "going on from own snapshot"


@dataclass
class Stop:
    """What came of a stop."""

    site: str
    when: str
    status: int
    """Of the training that was stopped."""
    seconds: float
    """From the signal to its end."""
    last_words: str
    again: int
    """Status of the same command, started again."""
    went_on: str
    """Where that one began, as it says."""
    checkpoints: str
    """Where they lie."""

    @property
    def wrong(self) -> str:
        """What is not as it must be; empty if all is."""
        if self.status != STOPPED:
            return f"ended with {self.status}, not {STOPPED}: {self.last_words}"
        if not self.last_words.startswith("stopped by SIGTERM"):
            return f"its last line is {self.last_words!r}"
        if self.again:
            return f"started again, it ended with {self.again}"
        if self.when != "at the start" and not self.went_on:
            return "started again, it began anew"
        return ""


def at_the_start(started: Started) -> None:
    """As soon as its first process runs, before Python has imported what it needs."""
    for _ in range(_TRIES):
        if started.runs():
            break
        time.sleep(0.05)
    started.stop()


def in_training(started: Started) -> None:
    """Between two snapshots."""
    _read_to(started, r'"step 1[0-9]/')
    started.stop()


def while_saving(started: Started) -> None:
    """As soon as the first periodic snapshot is due."""
    _read_to(started, r'"step 100/')
    started.stop()


def with_storage_stalled(halt: Callable[[], None], go_on: Callable[[], None]) -> WayToStop:
    """While a snapshot is uploaded for certain: the storage stands still meanwhile.

    Args:
        halt: lets the storage stand still.
        go_on: lets it go on.
    """

    def stop(started: Started) -> None:
        _read_to(started, r'"step 1[0-9]/')
        halt()
        try:
            _read_to(started, r'"step (95|[1-9][0-9][05])/')  # a snapshot is due at every 100
            time.sleep(0.5)
            started.stop()
            time.sleep(1.0)
        finally:
            go_on()

    return stop


def stop_and_go_on(site: Site, task: Task, when: str, way: WayToStop, log: Path) -> Stop:
    """Start a training's command with an output of its own, stop it, start it again to its end.

    Args:
        site: where it ran.
        task: the training.
        when: what to call the moment.
        way: waits for the moment and sends the signal.
        log: where the output of both is kept.
    """
    command, checkpoints = _with_own_output(task, when.replace(" ", "-"))
    stopped = site.start(command, task.environment)
    way(stopped)
    signalled = time.monotonic()
    status = stopped.end()
    seconds = time.monotonic() - signalled
    again = site.start(command, task.environment)
    status_again = again.end()
    log.write_text(f"{stopped.said}\n\nagain\n\n{again.said}\n", encoding="utf-8")
    found = [text for text in again.messages if text.startswith(_GOING_ON)]
    return Stop(
        site.name,
        when,
        status,
        seconds,
        (stopped.messages or [""])[-1],
        status_again,
        found[0].removeprefix(_GOING_ON).strip() if found else "",
        checkpoints,
    )


def _with_own_output(task: Task, name: str) -> tuple[list[str], str]:
    """The command with another directory for all that it writes, and where checkpoints go then."""
    at, told = told_to(task.command)
    directory = told["outputs"]["outputFile"].rpartition("/")[0].rpartition("/")[2]
    own = json.loads(json.dumps(told["outputs"]).replace(f"/{directory}/", f"/{name}/"))
    told = told | {"outputs": own}
    command = [*task.command[:at], json.dumps(told), *task.command[at + 1 :]]
    return command, str(own["artifacts"]["checkpoints"]["artifacts"][0]["uri"])


def _read_to(started: Started, pattern: str) -> None:
    for line in started:
        if re.search(pattern, line):
            return
