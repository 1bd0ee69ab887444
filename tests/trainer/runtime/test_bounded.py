"""A child process of bounded memory and time: every way that it ends is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.runtime.bounded import GIB, BoundedError, BoundedProcess
from trainer.runtime.errors import DataError

ANSWERS = """
import ctypes, os, time
from trainer.runtime.errors import DataError

def answer(request):
    name, _, argument = request.decode().partition(" ")
    if name == "echo":
        return argument.encode()
    if name == "raise":
        raise ValueError("a\\nvalue")
    if name == "refuse":
        raise DataError("not such data")
    if name == "segv":
        ctypes.string_at(0)
    if name == "abort":
        os.abort()
    if name == "exit":
        os._exit(3)
    if name == "take":
        return str(len(bytearray(int(argument)))).encode()
    if name == "spin":
        while True:
            pass
    if name == "sleep":
        time.sleep(3600)
    if name == "token":
        return os.environ.get("HF_TOKEN", "none").encode()
    raise AssertionError(name)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BoundedProcess]:
    (tmp_path / "answers_of_a_test.py").write_text(ANSWERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    with BoundedProcess("answers_of_a_test:answer", memory=GIB // 4) as process:
        yield process


def test_it_answers_again_and_again(child: BoundedProcess) -> None:
    for text in (b"", b"x", b"y" * 5_000_000):
        assert child.ask(b"echo " + text) == text
    with pytest.raises(BoundedError, match="^a value$"):
        child.ask(b"raise")
    with pytest.raises(DataError, match="^not such data$"):
        child.ask(b"refuse")
    assert child.ask(b"take 100000000") == b"100000000"
    assert child.ask(b"token") == b"none"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (b"segv", r"crashed \(SIGSEGV\)"),
        (b"abort", "more than 0.2 GiB of memory, or it is damaged"),
        (b"exit", r"crashed \(status 3\)"),
        (b"take 1000000000", "more than 0.2 GiB of memory"),
        (b"spin", "more than 1 s of processor time"),
    ],
)
def test_its_end_is_one_line(
    request_: bytes, message: str, child: BoundedProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BoundedError, match=message):
        child.ask(request_, seconds=1)
    assert capfd.readouterr() == ("", "")


def test_one_that_waits_is_not_waited_for(child: BoundedProcess) -> None:
    with pytest.raises(BoundedError, match="longer than 3 s"):
        child.ask(b"sleep", seconds=0.2)


def test_a_request_after_its_end_is_one_line(child: BoundedProcess) -> None:
    child._process.send_signal(signal.SIGSEGV)
    child._process.wait()
    with pytest.raises(BoundedError, match="crashed"):
        child.ask(b"echo x")


def test_what_does_not_start_is_one_line() -> None:
    with pytest.raises(BoundedError, match=r"crashed \(status 1\)"):
        BoundedProcess("no_such_module:answer")


def test_a_signal_to_the_parent_ends_both(tmp_path: Path) -> None:
    (tmp_path / "answers_of_a_test.py").write_text(ANSWERS)
    code = """
        import signal, sys
        from trainer.runtime.bounded import BoundedProcess
        from trainer.runtime.signals import end_on_signals
        end_on_signals()
        with BoundedProcess("answers_of_a_test:answer") as child:
            print(child._process.pid, flush=True)
            child.ask(b"spin", seconds=3000)
    """
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "trainer_image")))
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
