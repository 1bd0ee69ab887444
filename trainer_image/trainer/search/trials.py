"""A trial, what came of it, and where its checkpoints lie.

Trials and outcomes go from task to task as JSON texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.runtime.errors import DataError
from trainer.runtime.messages import brief
from trainer.runtime.strict_json import dumps
from trainer.settings.config import SETTINGS, TrainConfig, as_json
from trainer.settings.schedules import StepSchedule
from trainer.storage.files import read_regular

_LARGEST = 64 << 20
"""Bytes of a file of outcomes."""

_READABLE = 80
"""Characters of a location's name before its digest."""


def digest_of(value: Any) -> str:
    """A short name of a JSON value."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Trial:
    """Settings that are tried, with one of the search's seeds."""

    settings: Mapping[str, Any]
    """Over those that all trials have in common; None and an empty text stand for the default."""
    seed: int

    @property
    def group(self) -> str:
        """The name that the trials of the same settings share, whatever their seed."""
        return digest_of(dict(self.settings))

    def over(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting of the trial."""
        return {**common, **self.settings, "seed": self.seed}

    def dump(self) -> str:
        """As a text."""
        return dumps({"settings": dict(sorted(self.settings.items())), "seed": self.seed})

    @classmethod
    def parse(cls, text: str) -> Trial:
        """Read what `dump` has written.

        Raises:
            DataError: it is something else.
        """
        content = _table(text, "trial", {"settings": dict, "seed": int})
        return cls(content["settings"], content["seed"])


@dataclass(frozen=True)
class Outcome:
    """What came of a trial, at its end or at the end of a rung."""

    trial: Trial
    control: bool
    """Whether cross entropy alone trained it."""
    place: str
    """Where its checkpoints lie."""
    step: int
    """Updates done."""
    loss: float | None
    """The metric that trials are ranked by, in nats; None where the training failed."""
    tokens: int
    """It was trained on; 0 where the training failed."""
    eval_tokens: int | None
    """The loss is a mean over; None where nothing tells."""
    failed: str
    """Why the training cannot go on; empty where it can."""

    def dump(self) -> str:
        """As a text."""
        return dumps(asdict(self) | {"trial": self.trial.dump()})

    @classmethod
    def parse(cls, text: str) -> Outcome:
        """Read what `dump` has written.

        Raises:
            DataError: it is something else.
        """
        kinds = {"trial": str, "control": bool, "place": str, "step": int, "tokens": int}
        content = _table(text, "outcome", kinds | {"failed": str})
        loss, eval_tokens = content.get("loss"), content.get("eval_tokens")
        if not isinstance(loss, float | None) or not isinstance(eval_tokens, int | None):
            raise DataError(f"{brief(text)} is no outcome of a trial; repeat the search")
        fields = {name: content[name] for name in kinds if name != "trial"}
        return cls(
            Trial.parse(content["trial"]),
            loss=loss,
            eval_tokens=eval_tokens,
            failed=content["failed"],
            **fields,
        )


def _table(text: str, what: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    right = isinstance(content, dict) and all(
        type(content.get(name)) is kind for name, kind in kinds.items()
    )
    if not right:
        raise DataError(f"{brief(text)} is no {what} of a search; repeat the search")
    return dict(content)


def location_name(config: TrainConfig, tokens: str, targets: str | None) -> str:
    """The name of a trial's location, which tells everything that decides what it computes.

    A trial of another search, or of a wider one, with the same settings has the same name, so that
    it is not trained twice. Settings at their default are left out: a later release knows more.

    Args:
        config: of the trial.
        tokens: fingerprint of the token streams.
        targets: fingerprint of the teacher's targets; None where the trial needs none.
    """
    settings = {
        name: value
        for name, value in config.run_settings().items()
        if value != as_json(SETTINGS[name].default)
    }
    whole = {
        "settings": settings,
        "start": config.resume_gcs_uri,
        "tokens": tokens,
        "targets": targets,
    }
    if config.needs_teacher:
        taught = f"alpha{_span(config.schedule_alpha)}_T{_span(config.schedule_T)}"
    else:
        taught = "ce-only"
    readable = f"{taught}_lr{config.peak_lr:g}_seed{config.seed}"
    return f"{readable[:_READABLE]}_{digest_of(whole)}"


def _span(schedule: StepSchedule) -> str:
    """A schedule's first and last value."""
    ends = [schedule.at(0), *(value for _, value in schedule.entries[-1:])]
    return "-".join(f"{value:g}" for value in dict.fromkeys(ends))


def outcomes_at(path: str | None) -> list[str]:
    """The texts of outcomes in a file of the rungs before; none without one.

    Raises:
        DataError: it holds something else.
    """
    if path is None:
        return []
    content = json.loads(read_regular(path, limit=_LARGEST))
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise DataError(f"{path} does not hold outcomes of trials; repeat the search")
    return content
