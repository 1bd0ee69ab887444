"""What goes on from a rung, and what is kept for the ranking of all rungs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kfp import dsl

from components.keep_trials import keep_trials
from trainer.search.ranking import ranked
from trainer.search.trials import Outcome, Trial, outcomes_at


def outcome(rate: float, step: int, loss: float, *, control: bool = False) -> str:
    settings: dict[str, Any] = {"lr_peak": rate} | ({"alpha": 0.0} if control else {})
    place = f"/trials/{rate}-{control}"
    return Outcome(Trial(settings, 1), control, place, step, loss, 8 * step, 100, "").dump()


def test_the_better_half_goes_on_and_all_are_ranked(tmp_path: Path) -> None:
    first, second = (dsl.Artifact(uri=str(tmp_path / name)) for name in ("first", "second"))
    rung = [outcome(rate, 10, 3.0 + rate) for rate in (0.3, 0.1, 0.2, 0.4)]
    rung += [outcome(rate, 10, 5.0 + rate, control=True) for rate in (0.1, 0.2)]
    going_on = keep_trials.python_func(outcomes=rung, keep=0.5, standings=first)
    assert [Trial.parse(text).settings for text in going_on] == [
        *({"lr_peak": 0.1}, {"lr_peak": 0.2}, {"lr_peak": 0.1, "alpha": 0.0}),
    ]
    later = [outcome(rate, 20, 2.0 + rate) for rate in (0.2, 0.1)]
    later.append(outcome(0.1, 20, 4.0, control=True))
    last = keep_trials.python_func(outcomes=later, keep=0.5, standings=second, before=first)
    assert [Trial.parse(text).settings["lr_peak"] for text in last] == [0.1, 0.1]
    groups = ranked([Outcome.parse(text) for text in outcomes_at(second.path)])
    assert [(one.step, one.settings["lr_peak"]) for one in groups] == [
        *((20, 0.1), (20, 0.2), (20, 0.1)),
        *((10, 0.3), (10, 0.4), (10, 0.2)),
    ]
