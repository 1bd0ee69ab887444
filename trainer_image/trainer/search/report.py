"""What a search has found, in words and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.runtime.errors import TrainingError
from trainer.search.ranking import Comparison, Group, labels


@dataclass(frozen=True)
class Findings:
    """The ranking of a search and what follows from it.

    Raises:
        TrainingError: no training came to its end.
    """

    groups: Sequence[Group]
    """Best first, see `trainer.search.ranking.ranked`."""
    metric: str
    parameters: Mapping[str, str]
    """By name of a group: the pipeline's parameters that stand for its settings."""

    def __post_init__(self) -> None:
        if not self.winner.losses:
            raise TrainingError(f"no trial could go on; one says: {self.winner.failed[0].failed}")

    @property
    def winner(self) -> Group:
        """The best of all, which may be a control."""
        return self.groups[0]

    @property
    def winning_parameters(self) -> str:
        """What the whole pipeline is given to train with the winner's settings."""
        return self.parameters.get(self.winner.name, "")

    def _finalists(self) -> list[Group]:
        """Those that came as far as the winner, and failed with a seed only if it did."""
        failed = bool(self.winner.failed)
        return [
            group
            for group in self.groups
            if group.tokens == self.winner.tokens and bool(group.failed) == failed
        ]

    @property
    def places(self) -> list[str]:
        """Where the trials lie that came to the end, best first."""
        return [
            one.place for group in self._finalists() for one in group.outcomes if not one.failed
        ]

    def sentences(self) -> list[str]:
        """What the numbers do and do not tell."""
        names, finalists = labels(self.groups), self._finalists()
        first = next(one for one in self.winner.outcomes if not one.failed)
        on = "an unknown number of" if first.eval_tokens is None else f"{first.eval_tokens:,}"
        said = [
            f"{self.metric} in nats after training on {first.tokens:,} tokens, evaluated on"
            f" {on} tokens; the same numbers for every trial that came to the end."
        ]
        if self.winner.failed:
            said.append(
                "Of every setting that came to the end a seed has failed; the means are those of"
                " the others, so give more seeds."
            )
        others = [group for group in finalists[1:] if not group.control]
        controls = [group for group in finalists if group.control]
        if self.winner.control:
            said.append("Cross entropy alone wins: no distillation that was tried beats it.")
        if others:
            said.append(Comparison(self.winner, others[0]).sentence(names))
        if controls and not self.winner.control:
            said.append(Comparison(self.winner, controls[0]).sentence(names))
        return said

    def rows(self) -> list[dict[str, Any]]:
        """One a group, as JSON types."""
        names = labels(self.groups)
        return [
            {
                "settings": names[group.name],
                "control": group.control,
                "mean": group.mean if group.losses else None,
                "spread": group.spread,
                "losses": {str(seed): loss for seed, loss in group.losses.items()},
                "updates": group.step,
                "tokens": group.tokens,
                "failed": {str(one.trial.seed): one.failed for one in group.failed},
                "places": {str(one.trial.seed): one.place for one in group.outcomes},
                "parameters": self.parameters.get(group.name, ""),
            }
            for group in self.groups
        ]

    def markdown(self) -> str:
        """A table with the ranking, and sentences."""
        lines = [
            "| | settings | mean | spread | seeds | updates | losses by seed |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for number, row in enumerate(self.rows(), start=1):
            failed = f", {len(row['failed'])} failed" if row["failed"] else ""
            cells = (
                str(number),
                f"`{row['settings']}`",
                _number(row["mean"]),
                _number(row["spread"]),
                f"{len(row['losses'])}{failed}",
                str(row["updates"]),
                ", ".join(f"{seed}: {loss:.4f}" for seed, loss in row["losses"].items()),
            )
            lines.append(f"| {' | '.join(cells)} |")
        said = [f"- {sentence}" for sentence in self.sentences()]
        winning = ["The winner as `PARAMS` of the whole pipeline:", "", "```"]
        winning += [self.winning_parameters, "```"]
        return "\n".join([*lines, "", *said, "", *winning, ""])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
