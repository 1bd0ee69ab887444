"""Ranking of outcomes: what counts, what goes on, and what the seeds' spread leaves open."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.runtime.errors import DataError, TrainingError
from trainer.search.ranking import Comparison, Group, going_on, labels, ranked
from trainer.search.report import Findings
from trainer.search.trials import Outcome, Trial

CE: dict[str, Any] = {"alpha": 0.0, "alpha_schedule": None}


def outcome(settings: dict[str, Any], seed: int, loss: float | None, **other: Any) -> Outcome:
    values: dict[str, Any] = {"step": 10, "tokens": 1000, "eval_tokens": 500}
    values |= {"failed": "" if loss is not None else "it diverged"} | other
    if loss is None:
        values["tokens"] = 0
    control = settings.get("alpha") == 0.0
    return Outcome(
        Trial(settings, seed), control, f"/trials/{settings}-{seed}", loss=loss, **values
    )


def group(settings: dict[str, Any], *losses: float | None, **other: Any) -> list[Outcome]:
    return [outcome(settings, seed, loss, **other) for seed, loss in enumerate(losses, start=1)]


def names(groups: list[Group]) -> list[str]:
    found = labels(groups)
    return [found[one.name] for one in groups]


def test_outcomes_survive_their_texts() -> None:
    for one in (*group({"lr_peak": 1e-3}, 3.5, None), *group(CE, 3.0, eval_tokens=None)):
        assert Outcome.parse(one.dump()) == one
    for text in ("", "{}", '{"trial": 3}', "[1]"):
        with pytest.raises(DataError, match="is no outcome of a search; repeat the search"):
            Outcome.parse(text)


def test_the_lowest_mean_is_first_and_what_failed_is_last() -> None:
    groups = ranked(
        [
            *group({"lr_peak": 1e-3}, 3.4, 3.6),
            *group({"lr_peak": 2e-3}, 3.1, 3.2),
            *group({"lr_peak": 4e-3}, 2.9, None),
            *group({**CE, "lr_peak": 1e-3}, 3.3, 3.3),
        ]
    )
    assert names(groups) == [
        *("lr_peak=0.002", "CE only lr_peak=0.001", "lr_peak=0.001", "lr_peak=0.004"),
    ]
    assert [one.mean for one in groups[:3]] == [pytest.approx(m) for m in (3.15, 3.3, 3.5)]
    assert groups[0].spread == pytest.approx(0.1)
    assert [one.failed for one in groups[3].failed] == ["it diverged"]


def test_losses_over_other_numbers_of_tokens_are_refused() -> None:
    for other in ({"tokens": 999}, {"eval_tokens": 499}):
        with pytest.raises(DataError, match="their losses cannot be compared"):
            ranked([*group({"lr_peak": 1e-3}, 3.4), *group({"lr_peak": 2e-3}, 3.4, **other)])
    with pytest.raises(DataError, match="no trials"):
        ranked([])


def test_the_better_part_goes_on_with_the_best_control() -> None:
    tried = [group({"lr_peak": rate}, 3.0 + rate, 3.1 + rate) for rate in (0.1, 0.3, 0.2)]
    controls = [group({**CE, "lr_peak": rate}, 4.0 + rate) for rate in (0.2, 0.1)]
    groups = ranked([one for of in (*tried, *controls) for one in of])
    assert names(going_on(groups, 0.5)) == [
        *("lr_peak=0.1", "lr_peak=0.2", "CE only lr_peak=0.1"),
    ]
    with pytest.raises(TrainingError, match="no trial could go on; one says: it diverged"):
        going_on(ranked(group({"lr_peak": 0.1}, None)), 0.5)


def test_a_later_rung_counts_and_comes_first() -> None:
    first = [*group({"lr_peak": 0.1}, 3.4), *group({"lr_peak": 0.2}, 3.0)]
    second = group({"lr_peak": 0.1}, 3.2, step=20, tokens=2000)
    groups = ranked([*first, *second])
    assert [(one.step, one.mean) for one in groups] == [(20, 3.2), (10, 3.0)]


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (
            (3.0, 3.07),
            (3.05, 3.12),
            "(not told apart: the spread over seeds is 0.0700; lower",
        ),
        ((3.0, 3.01), (3.05, 3.06), "(told apart: the spread over seeds is 0.0100; lower with 2"),
        ((3.0,), (3.2,), "not told apart: one seed tells nothing of the spread"),
        (
            (3.0,),
            (3.01, 3.09),
            "(not told apart: the spread over seeds is 0.0800; lower",
        ),
    ],
)
def test_what_the_spread_leaves_open(
    first: tuple[float, ...], second: tuple[float, ...], verdict: str
) -> None:
    groups = ranked([*group({"lr_peak": 0.1}, *first), *group({"lr_peak": 0.2}, *second)])
    sentence = Comparison(*groups).sentence(labels(groups))
    assert sentence.startswith("lr_peak=0.1 is 0.")
    assert verdict in sentence


def test_the_findings_say_on_how_many_tokens_and_what_beats_the_control() -> None:
    tried, control = group({"lr_peak": 0.1}, 3.0, 3.01), group({**CE, "lr_peak": 0.1}, 3.2, 3.21)
    groups = ranked([*tried, *control])
    parameters = {groups[0].name: "anneal_lr_peak=0.1"}
    said = Findings(groups, "val_loss_student", parameters)
    assert said.winning_parameters == "anneal_lr_peak=0.1"
    assert said.sentences()[0].startswith(
        "val_loss_student in nats after training on 1,000 tokens, evaluated on 500 tokens"
    )
    assert said.sentences()[1].endswith("lower with 2 of 2 seeds).")
    assert "| 1 | `distilled` | 3.0050 | 0.0100 | 2 |" in said.markdown()
    worse = ranked([*group({"lr_peak": 0.1}, 3.3, 3.3), *control])
    assert Findings(worse, "val_loss_student", {}).sentences()[1] == (
        "Cross entropy alone wins: no distillation that was tried beats it."
    )
    with pytest.raises(TrainingError, match="no trial could go on; one says: it diverged"):
        Findings(ranked(group({"lr_peak": 0.1}, None)), "val_loss_student", {})


def test_a_seed_that_fails_everywhere_does_not_take_the_ranking_away() -> None:
    """What the other seeds have cost is not lost with it."""
    outcomes = [*group({"lr_peak": 0.1}, 3.0, None), *group({**CE, "lr_peak": 0.1}, None, 3.2)]
    groups = ranked(outcomes)
    assert going_on(groups, 0.5) == groups
    found = Findings(groups, "val_loss_student", {})
    assert found.places == ["/trials/{'lr_peak': 0.1}-1", outcomes[3].place]
    assert found.sentences()[0].startswith("val_loss_student in nats after training on 1,000")
    assert "a seed has failed" in found.sentences()[1]
    assert found.sentences()[2].startswith("distilled is 0.2000 nats below CE only (not told apart")
    # Where one setting is whole, the others end
    whole = ranked([*outcomes, *group({"lr_peak": 0.2}, 5.0, 5.0)])
    assert [one.settings for one in going_on(whole, 0.5)] == [{"lr_peak": 0.2}]
    assert len(Findings(whole, "val_loss_student", {}).places) == 2
