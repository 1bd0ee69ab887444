"""How durations read."""

from __future__ import annotations

import pytest

from trainer.runtime.messages import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (3599.6, "1 h"),
        (7500, "2 h 5 min"),
        (86_399, "1 d"),
        (1e6, "11 d 14 h"),
    ],
)
def test_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text
