"""The evaluation's rows, read back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainer.metrics.evaluated import METRICS_JSON, EvaluationRow, markdown_table, read_rows
from trainer.runtime.errors import MetricsError
from trainer.runtime.strict_json import dumps

ROWS = [
    EvaluationRow("a|b.pt", 7, 32, 64, 3.25, math.exp(3.25), 3.0, math.exp(3.0)),
    EvaluationRow("bare.pt", 0, None, 128, math.nan, math.inf, None, None),
]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / METRICS_JSON).write_text(dumps([asdict(row) for row in ROWS]))
    for place in (tmp_path, tmp_path / METRICS_JSON):
        first, second = read_rows(str(place))
        assert first == ROWS[0]
        assert math.isnan(second.student_loss)
        assert (second.trained_at, second.teacher_loss) == (None, None)


def test_the_table_says_on_how_many_tokens_each_loss_is_a_mean() -> None:
    part, whole = (replace(ROWS[0], tokens=n, tokens_of_split=40_000) for n in (1_000, 40_000))
    ends = [line.split(" | ")[-1] for line in markdown_table([part, whole, *ROWS]).splitlines()]
    assert ends[0] == "tokens |"
    assert ends[2:] == ["1,000 of 40,000 |", "40,000 |", "– |", "– |"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not JSON"),
        ("{}", "is no list of rows"),
        ("[1]", "row 1: it has no 'checkpoint'"),
        (json.dumps([asdict(ROWS[0]) | {"step": -1}]), "row 1: its step is -1, not a whole number"),
        (json.dumps([asdict(ROWS[0]) | {"context": 1.5}]), "its context is 1.5"),
        (json.dumps([asdict(ROWS[0]) | {"checkpoint": None}]), "its checkpoint is None"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=range(7),
)
def test_other_files_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / METRICS_JSON).write_text(text)
    with pytest.raises(MetricsError, match=told):
        read_rows(str(tmp_path))
