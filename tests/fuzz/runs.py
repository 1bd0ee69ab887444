"""How the fuzzers run: with a fixed seed, and with the promise as their only assertion."""

from __future__ import annotations

import contextlib
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.runtime.errors import LiquidError

GIB = 1 << 30


def run_property(
    check: Callable[[Any], bool], cases: st.SearchStrategy[Any], *, examples: int
) -> None:
    """Check many cases; print how many were accepted and how many refused."""
    seen: Counter[str] = Counter()

    def counted(case: Any) -> None:
        seen["accepted" if check(case) else "refused"] += 1

    limits = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    limits(given(cases)(counted))()
    print(f"{sum(seen.values())} cases: {dict(seen)}")
    assert set(seen) == {"accepted", "refused"}, "the cases are too tame, or too wild"


def one_line(error: LiquidError) -> None:
    """A message as `report_failure` shows it: something to read, and not the whole file."""
    text = " ".join(str(error).split())
    assert 10 < len(text) < 9000, text[:3000]
    assert error.exit_status in (1, 2)
    assert "Traceback" not in text


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a directory."""
    status = {str(path): path.lstat() for path in directory.rglob("*")}
    return {name: (one.st_size, one.st_mtime_ns) for name, one in status.items()}


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """The process takes less than 1 GiB more in between."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert taken < GIB, f"{taken} bytes more"
