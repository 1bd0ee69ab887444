"""SIGTERM outside of the training loop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

from trainer.runtime.commands import run_command
from trainer.runtime.signals import SIGTERM_STATUS, end_on_sigterm

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


def started(code: str, **environ: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environ,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


def test_a_command_cleans_up_and_ends_in_one_line() -> None:
    process = started(COMMAND)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == SIGTERM_STATUS == 143
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
            end_on_sigterm()
        except ValueError as error:  # what signal.signal raises there
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert failures == []
