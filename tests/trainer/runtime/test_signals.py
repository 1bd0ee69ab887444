"""How SIGTERM and SIGINT end a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.interrupts import with_interrupts
from trainer.runtime.commands import run_command
from trainer.runtime.signals import end_on_signals

COMMAND = """
import sys, time
from trainer.runtime.commands import run_command

def command(argv):
    try:
        print("at work", flush=True)
        time.sleep(60)
    except Exception:
        print("taken for a failure", flush=True)
    finally:
        print("cleaned up", flush=True)

sys.exit(run_command(command))
"""


def started(
    code: str, *argv: str, stderr: int = subprocess.PIPE, **environ: str
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environ,
        preexec_fn=with_interrupts,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


def test_a_command_cleans_up_and_ends_in_one_line() -> None:
    process = started(COMMAND)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert output == "cleaned up\n"
    (line,) = errors.splitlines()
    assert json.loads(line)["message"] == "stopped by SIGTERM"


def test_of_several_processes_one_tells() -> None:
    process = started(COMMAND, RANK="1")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "")


def test_a_caller_keeps_its_own_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    try:
        assert run_command(lambda _: seen.append(signal.getsignal(signal.SIGTERM)), []) == 0
        assert signal.getsignal(signal.SIGTERM) is before
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert run_command(lambda _: seen.append(signal.getsignal(signal.SIGTERM)), []) == 0
        assert seen[1] is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_nothing_is_changed() -> None:
    failures: list[BaseException] = []

    def call() -> None:
        try:
            end_on_signals()
        except ValueError as error:  # what signal.signal raises there
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert failures == []


SWALLOWING = """
import sys, time
from trainer.runtime.commands import run_command

def command(argv):
    for again in range(int(sys.argv[1])):
        try:
            print("at work", flush=True)
            time.sleep(60)
        except BaseException:
            pass

sys.exit(run_command(command))
"""

CALLBACK = """
import ctypes, sys, time
from trainer.runtime.commands import run_command

@ctypes.CFUNCTYPE(None)
def callback():
    print("at work", flush=True)
    time.sleep(60)

def command(argv):
    callback()
    time.sleep(60)

sys.exit(run_command(command))
"""

NATIVE = """
import ctypes, sys
from trainer.runtime.commands import run_command

def command(argv):
    pthread, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    print("at work", flush=True)
    for _ in range(2):
        pthread.pthread_mutex_lock(mutex)

sys.exit(run_command(command))
"""

IMPORTING = """
import time
from trainer.runtime.signals import watch_signals

watch_signals()
print("at work", flush=True)
try:
    time.sleep(60)
except BaseException:
    print("an import takes it for a failure")
"""

STAGE = """
import time
from trainer.runtime.commands import start_stage

start_stage()
try:
    print("at work", flush=True)
    time.sleep(60)
except BaseException:
    pass
"""

NUMBERS = pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)


@NUMBERS
@pytest.mark.parametrize("code", [COMMAND, SWALLOWING, CALLBACK, NATIVE, IMPORTING, STAGE])
def test_a_stop_ends_in_one_line_whatever_runs(
    code: str, number: signal.Signals, status: int, message: str
) -> None:
    """What the handler raises is swallowed, or native code keeps it from running at all."""
    for times in ("1", "100"):
        process = started(code, times)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        (line,) = errors.splitlines()
        assert (process.returncode, json.loads(line)["message"]) == (status, message)


SAVING = """
import sys, time
from trainer.runtime.commands import run_command
from trainer.runtime.signals import saving_on_signals

def command(argv):
    with saving_on_signals(lambda number: print(number.name, flush=True), lambda: "x is not saved"):
        print("at work", flush=True)
        while True:
            time.sleep(60)

sys.exit(run_command(command))
"""


@NUMBERS
def test_a_second_signal_ends_what_is_being_saved(
    number: signal.Signals, status: int, message: str
) -> None:
    process = started(SAVING)
    assert process.stdout is not None
    for _ in range(2):  # as a launcher repeats it at once; the two may arrive as one
        process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    (line,) = errors.splitlines()
    assert process.returncode == status
    assert json.loads(line)["message"] == f"{message}; x is not saved"


def test_a_log_that_nobody_reads_keeps_no_process() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    process = started(COMMAND, stderr=writing)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    os.close(reading)
    os.close(writing)


FINISHED = """
import sys, time
from trainer.runtime.signals import watch_signals

watch_signals()
from trainer.runtime.commands import run_command

status = run_command(lambda argv: None, [])
print("at work", flush=True)
time.sleep(int(sys.argv[1]))
sys.exit(status)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", ["1", "60"])
def test_a_signal_after_the_end_changes_nothing(number: signal.Signals, seconds: str) -> None:
    process = started(FINISHED, seconds)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


FORKING = """
import os, signal, sys, time
from trainer.runtime.commands import run_command

def command(argv):
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(1)
    os.kill(child, signal.SIGTERM)
    print("at work", flush=True)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    time.sleep(1)

sys.exit(run_command(command))
"""


def test_a_signal_to_a_forked_child_is_its_own() -> None:
    process = started(FORKING)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
