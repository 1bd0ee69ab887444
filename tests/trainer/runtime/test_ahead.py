"""Work in the background."""

from __future__ import annotations

import sys
import threading

import pytest

from trainer.runtime.ahead import Ahead


def test_the_result_is_waited_for_and_a_failure_raised_again() -> None:
    gate = threading.Event()
    work = Ahead("test", lambda: gate.wait(20) and threading.current_thread().name)
    threading.Timer(0.05, gate.set).start()
    assert work.result() == work.result() == "test"

    def fail() -> None:
        raise OSError("no such thing")

    with pytest.raises(OSError, match="no such thing"):
        Ahead("test", fail).result()


def test_imports_end_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("colorsys", "no_such_module", "chunk_of_nothing", "sndhdr_of_nothing", "this_is_last")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    gate = threading.Event()
    work = Ahead("test", lambda: gate.wait(20))
    asked: list[str] = []

    def modules():  # type: ignore[no-untyped-def]
        for name in names:
            asked.append(name)
            if name == "no_such_module":
                gate.set()
                work.result()
            yield name

    assert work.importing(modules()) is True
    assert "colorsys" in sys.modules
    assert asked == ["colorsys", "no_such_module"], "the work is done: nothing else is imported"
