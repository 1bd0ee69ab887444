"""Ranking what was tried: by the mean loss over seeds, with the spread that seeds alone give."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.runtime.errors import DataError, TrainingError
from trainer.search.trials import Outcome

CONTROL = "CE only"
"""How the label of a control begins."""


@dataclass(frozen=True)
class Group:
    """The trials of the same settings, one a seed, at the last rung that they came to."""

    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        """See `trainer.search.trials.Trial.group`."""
        return self.outcomes[0].trial.group

    @property
    def settings(self) -> Mapping[str, Any]:
        """Over those that all trials have in common."""
        return self.outcomes[0].trial.settings

    @property
    def control(self) -> bool:
        """Whether cross entropy alone trained them."""
        return self.outcomes[0].control

    @property
    def step(self) -> int:
        """Updates that they came to."""
        return self.outcomes[0].step

    @property
    def tokens(self) -> int:
        """They were trained on; 0 where all have failed."""
        return max(one.tokens for one in self.outcomes)

    @cached_property
    def losses(self) -> dict[int, float]:
        """In nats by seed; without the trials that failed."""
        return {one.trial.seed: one.loss for one in self.outcomes if one.loss is not None}

    @property
    def failed(self) -> list[Outcome]:
        """Those whose training could not go on."""
        return [one for one in self.outcomes if one.failed]

    @property
    def mean(self) -> float:
        """Of the losses; infinity where there is none."""
        return statistics.fmean(self.losses.values()) if self.losses else math.inf

    @property
    def spread(self) -> float | None:
        """From the lowest loss to the highest, in nats; None where there are fewer than two."""
        losses = self.losses.values()
        return max(losses) - min(losses) if len(losses) > 1 else None


def ranked(outcomes: Sequence[Outcome]) -> list[Group]:
    """The groups, best first: by the rung that they came to, then whole ones, then by their mean.

    Args:
        outcomes: of one rung or of several; of each trial its last one counts.

    Raises:
        DataError: there is none, or trials of a rung were trained or evaluated on different
            numbers of tokens.
    """
    if not outcomes:
        raise DataError("there are no trials to rank")
    last: dict[str, dict[int, Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda one: one.step):
        of_group = last.setdefault(outcome.trial.group, {})
        if of_group and next(iter(of_group.values())).step < outcome.step:
            of_group.clear()
        of_group[outcome.trial.seed] = outcome
    groups = [Group(tuple(of[seed] for seed in sorted(of))) for of in last.values()]
    groups.sort(key=lambda one: (-one.tokens, bool(one.failed), one.mean, one.name))
    whole = [one for group in groups for one in group.outcomes if not one.failed]
    for step in {one.step for one in whole}:
        _check_equal([one for one in whole if one.step == step], "tokens", "trained on")
    _check_equal(whole, "eval_tokens", "evaluated on")
    return groups


def _check_equal(outcomes: list[Outcome], what: str, words: str) -> None:
    by_number = {getattr(one, what): one for one in outcomes}
    if len(by_number) > 1:
        (some, first), (others, second) = list(by_number.items())[:2]
        raise DataError(
            f"{first.place} was {words} {some} tokens, {second.place} on {others}: their losses"
            " cannot be compared; remove the older location and repeat the search"
        )


def going_on(groups: Sequence[Group], keep: float) -> list[Group]:
    """The better part of the groups, and of the controls, of which at least one each goes on.

    Those of which a seed has failed go on only where there are no others.

    Args:
        groups: ranked.
        keep: the part, above 0 and at most 1; rounded up.

    Raises:
        TrainingError: no training could go on.
    """
    whole = [group for group in groups if not group.failed]
    whole = whole or [group for group in groups if group.losses]
    if not whole:
        raise TrainingError(f"no trial could go on; one says: {groups[0].failed[0].failed}")
    kept: list[Group] = []
    for control in (False, True):
        there = sum(group.control == control for group in groups)
        kept += [group for group in whole if group.control == control][: math.ceil(there * keep)]
    return [group for group in whole if group in kept]


def labels(groups: Sequence[Group]) -> dict[str, str]:
    """By name of a group: the settings in which the groups differ."""
    texts = {
        group.name: {name: str(value) for name, value in group.settings.items() if shown(value)}
        for group in groups
    }
    names = dict.fromkeys(name for settings in texts.values() for name in settings)
    ways = {group.name: [texts[group.name].get(name) for name in names] for group in groups}
    varied = {
        name
        for position, name in enumerate(names)
        if len({values[position] for values in ways.values()}) > 1
    }
    found = {}
    for group in groups:
        own = texts[group.name]
        pieces = [f"{name}={own[name]}" for name in names if name in varied and name in own]
        if group.control:
            pieces = [CONTROL, *(piece for piece in pieces if not piece.startswith("alpha"))]
        found[group.name] = " ".join(pieces) or "distilled"
    return found


def shown(value: Any) -> bool:
    """Whether a setting of a trial is more than the end of a common one."""
    return value is not None and value != ""


@dataclass(frozen=True)
class Comparison:
    """Two groups, the better one first."""

    better: Group
    other: Group

    @property
    def difference(self) -> float:
        """Of the means, in nats."""
        return self.other.mean - self.better.mean

    @property
    def spread(self) -> float | None:
        """Over seeds, the larger one of both groups; None where neither has two seeds."""
        known = [group.spread for group in (self.better, self.other) if group.spread is not None]
        return max(known, default=None)

    @property
    def told_apart(self) -> bool:
        """Whether the means differ by more than the seeds' spread."""
        return self.spread is not None and self.difference > self.spread

    @property
    def wins(self) -> tuple[int, int]:
        """With how many seeds the better one has the lower loss, of how many both have."""
        mine, theirs = self.better.losses, self.other.losses
        both = mine.keys() & theirs.keys()
        return sum(mine[seed] < theirs[seed] for seed in both), len(both)

    def sentence(self, names: Mapping[str, str]) -> str:
        """What may be said of them, with the groups' labels."""
        first, second = names[self.better.name], names[self.other.name]
        wins, both = self.wins
        if self.spread is None:
            verdict = "not told apart: one seed tells nothing of the spread, so give more seeds"
        else:
            words = "told apart" if self.told_apart else "not told apart"
            verdict = (
                f"{words}: the spread over seeds is {self.spread:.4f}; lower with {wins} of"
                f" {both} seeds"
            )
        return f"{first} is {self.difference:.4f} nats below {second} ({verdict})."
