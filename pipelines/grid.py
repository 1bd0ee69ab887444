"""The grid of a search: a YAML file that says which settings are tried, read and checked.

    settings:                       # every combination is tried
      alpha_schedule: ["0:1.0", "0:0.7,400:0.5,800:0.3"]
      lr_peak: {from: 1e-4, to: 4e-4, count: 3, scale: log}
    seeds: [1, 2]
    max_trials: 24

Whatever is wrong with it is told in one line, before anything runs.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.parameters import (
    DEFAULT_METRIC,
    check_parameters,
    check_training,
    parameter_defaults,
    setting_of,
    split_stage,
    stage_values,
)
from trainer.runtime.errors import UsageError
from trainer.runtime.messages import brief
from trainer.runtime.near_names import near_name
from trainer.search.ranking import shown
from trainer.search.trials import Trial
from trainer.settings.config import SETTINGS, TrainConfig, as_json
from trainer.settings.layers import Resolved, resolve
from trainer.settings.schedules import StepSchedule
from trainer.settings.text_yaml import read_settings
from trainer.settings.values import check_names, given, parse_value
from trainer.targets.shares import shares_of

NAME = "liquid-search"
"""Of the pipeline of a search."""

STAGE = "anneal"
"""The training whose settings are searched."""

OF_THE_TOKENS = ("dataset_name", "dataset_config", "dataset_revision")
"""Parameters that the trials' tokens are made of, beside the column and the tokenizer."""

_MOST_COMBINATIONS = 10**9
_MOST_RUNGS = 8
_LARGEST = 10_000
"""Of a grid's own numbers, but for updates and seeds."""

_ELSEWHERE = {
    "seed": "give seeds beside settings",
    "lr": "give lr_peak",
    "block_size": "losses at different contexts cannot be compared; give PARAMS=anneal_block_size",
    "eval_max_tokens": "losses over different tokens cannot be compared; give it in PARAMS",
    "save_best_on": "trials are ranked by one metric; give PARAMS=best_metric",
    "teacher_precision": "the teacher's targets are made once, for all trials",
    "hf_token_value": "it would be stored with the search; give PARAMS=hf_secret_name",
    "grad_accum": "give global_batch",
    **dict.fromkeys(
        ("teacher_name", "teacher_revision", "text_column", *OF_THE_TOKENS),
        "all trials have the same teacher and tokens; give it in PARAMS",
    ),
}
"""Settings that no grid may hold, and what to do instead."""

_ENDS = {"alpha": "alpha_schedule", "T": "temp_schedule", "global_batch": "grad_accum"}
"""Settings that would have no effect beside another one, which common settings may hold."""

_OF_DISTILLATION = ("alpha", "alpha_schedule", "T", "temp_schedule", "kd_scheme")


def _key(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Grid:
    """What the file says.

    Raises:
        UsageError: a value that makes no sense; one line, which begins with the key's name.
    """

    settings: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "by setting the values to try: a list, or a range; all combinations"},
    )
    trials: list[Any] = field(
        default_factory=list, metadata={"help": "further trials, each with settings of its own"}
    )
    seeds: tuple[int, ...] = _key((), "one training each of all settings [PARAMS=seed]")
    train_steps: int = _key(0, "updates of a trial [PARAMS=anneal_train_steps]")
    max_trials: int = _key(24, "refuse to begin more trainings than these, seeds and controls too")
    sample: int = _key(0, "try this many of the combinations, drawn at random [all]")
    rungs: tuple[int, ...] = _key((), "updates at which the better part of the trials goes on")
    keep: float = _key(0.5, "the part that goes on from each rung")
    parallelism: int = _key(4, "trials that run at a time; one, in the local runner")

    def __post_init__(self) -> None:
        for name, least in (("train_steps", 0), ("max_trials", 1), ("sample", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: {getattr(self, name)} must be at least {least}")
        if not 1 <= self.parallelism <= _LARGEST:
            raise UsageError(f"parallelism: {self.parallelism} must be at least 1")
        if not 0.0 < self.keep < 1.0:
            raise UsageError(f"keep: {self.keep:g} must be above 0 and below 1")
        if len(self.rungs) > _MOST_RUNGS:
            raise UsageError(f"rungs: {len(self.rungs)} of them; {_MOST_RUNGS} are the most")
        if any(b <= a for a, b in itertools.pairwise((0, *self.rungs))):
            raise UsageError(f"rungs: {list(self.rungs)} must be updates that rise")
        if not self.settings and not self.trials:
            raise UsageError("there is nothing to try; give settings, trials or both")


def read_grid(path: str) -> Grid:
    """The grid in a file.

    Raises:
        UsageError: the file cannot be read, or what it says makes no sense; names file and key.
    """
    named = f"GRID={path}"
    content = read_settings(Path(path), named)
    known = [spec.name for spec in fields(Grid)]
    for name in content:
        if name not in known:
            near = near_name(str(name), known)
            hint = f"; did you mean {near}?" if near else f"; it may be {', '.join(known)}"
            if name in SETTINGS:
                hint = "; settings to try stand below 'settings:'"
            raise UsageError(f"{named}: unknown key {brief(name)}{hint}")
    try:
        values = {name: _own_value(name, value) for name, value in content.items()}
        return Grid(**values)
    except UsageError as error:
        raise UsageError(f"{named}: {error}") from None


def _own_value(name: str, value: Any) -> Any:
    """The value of one of the grid's keys, from text."""
    if name in ("seeds", "rungs"):
        if not isinstance(value, list) or not value:
            raise UsageError(f"{name}: a list of whole numbers is needed, such as [1, 2]")
        numbers = tuple(_whole(name, one) for one in value)
        if len(set(numbers)) < len(numbers):
            raise UsageError(f"{name}: {list(numbers)} holds a number twice; keep one of them")
        return numbers
    if name in ("settings", "trials"):
        kind = dict if name == "settings" else list
        if not isinstance(value, kind) or not value:
            words = "names with values to try" if name == "settings" else "a list of trials"
            raise UsageError(f"{name}: {words} are needed, or leave it out")
        return value
    return _number(name, value) if name == "keep" else _whole(name, value)


def _whole(name: str, value: Any) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UsageError(f"{name}: {brief(value)} is no whole number from 0 on")
    return int(text)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name}: {brief(value)} is no number")
    return number


# ── the values of a setting ───────────────────────────────────────────────────────────────────


def _values(name: str, given: Any) -> list[Any]:
    """The values to try of a setting, as JSON types."""
    _check_setting(name)
    if isinstance(given, dict):
        given = _range(name, given)
    if not isinstance(given, list):
        given = [given]
    if not given:
        raise UsageError(f"settings: {name} has an empty list; give values to try")
    parsed = [as_json(parse_value(name, value)) for value in given]
    for number, value in enumerate(parsed):
        if value in parsed[:number]:
            raise UsageError(f"settings: {name} has {brief(value)} twice; keep one of them")
    return parsed


def _check_setting(name: str) -> None:
    check_names([name])
    if name in _ELSEWHERE:
        raise UsageError(f"{name} is not for a grid: {_ELSEWHERE[name]}")
    if not SETTINGS[name].metadata["defines_run"]:
        raise UsageError(
            f"{name} is not for a grid: it does not change what is trained; give it in PARAMS"
        )


def _range(name: str, given: Mapping[str, Any]) -> list[Any]:
    """The values of ``{from: 1e-4, to: 4e-4, count: 3, scale: log}``, to six digits."""
    wanted = ("from", "to", "count")
    for key in given:
        if key not in (*wanted, "scale"):
            raise UsageError(f"settings: the range of {name} has {brief(key)}; {_RANGE}")
    missing = [key for key in wanted if given.get(key) is None]
    if missing:
        raise UsageError(f"settings: the range of {name} has no {missing[0]!r}; {_RANGE}")
    start, end = (_number(f"settings: {name}: {key}", given[key]) for key in ("from", "to"))
    count = _whole(f"settings: {name}: count", given["count"])
    scale = given.get("scale") or "linear"
    if not 2 <= count <= _LARGEST or start == end:
        raise UsageError(f"settings: the range of {name} needs two ends and a count of 2 or more")
    if scale not in ("linear", "log"):
        raise UsageError(f"settings: {name}: scale: {brief(scale)}; choose linear or log")
    if scale == "log" and min(start, end) <= 0.0:
        raise UsageError(f"settings: the range of {name} is logarithmic, so its ends are above 0")
    parts = [number / (count - 1) for number in range(count)]
    if scale == "log":
        exact = [start * (end / start) ** part for part in parts]
    else:
        exact = [start + (end - start) * part for part in parts]
    return [float(f"{value:.6g}") for value in exact]


_RANGE = "write {from: 1e-4, to: 4e-4, count: 3, scale: log}, where scale may be linear"


def _combinations(grid: Grid) -> list[dict[str, Any]]:
    """The combinations to try, in the order of the file; or some of them, drawn at random."""
    if not grid.settings:
        return []
    values = {name: _values(name, given) for name, given in grid.settings.items()}
    total = math.prod(len(some) for some in values.values())
    if total > _MOST_COMBINATIONS:
        raise UsageError(f"settings: {total} combinations; try fewer values")
    if grid.sample and grid.sample < total:
        # Always the same ones, so that a repeated search finds them in the cache
        chosen: Iterable[int] = sorted(random.Random(0).sample(range(total), grid.sample))  # noqa: S311
    elif total > grid.max_trials:
        raise UsageError(
            f"settings: {total} combinations are more than max_trials: {grid.max_trials}; try fewer"
            " values, raise it, or give sample: N for a random part"
        )
    else:
        chosen = range(total)
    found = []
    for number in chosen:
        combination, left = {}, number
        for name, some in reversed(values.items()):
            left, position = divmod(left, len(some))
            combination[name] = some[position]
        found.append({name: combination[name] for name in values})
    return found


def _listed(grid: Grid) -> list[dict[str, Any]]:
    """The trials that are listed one by one."""
    found = []
    for number, trial in enumerate(grid.trials, start=1):
        if not isinstance(trial, dict) or not trial:
            raise UsageError(f"trials: number {number} is {brief(trial)}, not settings with values")
        for name in trial:
            _check_setting(name)
        found.append({name: as_json(parse_value(name, value)) for name, value in trial.items()})
    return found


# ── the search ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Search:
    """What there is to train, checked.

    Raises:
        UsageError: something is wrong with the grid or with a trial; names both.
    """

    grid: Grid
    base: Mapping[str, Any]
    """Every parameter of the pipeline."""
    own: Mapping[str, Any]
    """Those parameters that the user gave."""
    path: str
    """Of the grid's file."""
    processes: int = 1
    """GPUs of a trial."""

    def __post_init__(self) -> None:
        try:
            self._check_count()
            self._check_tokens()
        except UsageError as error:
            raise UsageError(f"GRID={self.path}: {error}") from None

    @cached_property
    def metric(self) -> str:
        """That trials are ranked by."""
        return str(self.base["best_metric"] or DEFAULT_METRIC)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Each of which trains every setting."""
        return self.grid.seeds or (int(self.base["seed"]),)

    @cached_property
    def common(self) -> dict[str, Any]:
        """The trainer's settings that all trials have, without places."""
        settings = stage_values(self.base, STAGE) | {"save_best_on": self.metric}
        if self.grid.train_steps:
            settings["train_steps"] = self.grid.train_steps
        left_out = ("seed", "hf_secret_name", "text_column", *OF_THE_TOKENS)
        return {
            name: value
            for name, value in settings.items()
            if name not in left_out and value not in (None, "")
        }

    @cached_property
    def settings(self) -> list[dict[str, Any]]:
        """Of each group of trials, over the common ones; the controls come last.

        A trial of cross entropy alone is a control, whatever its temperature. There is one for each
        combination of the other settings.
        """
        tried: dict[str, dict[str, Any]] = {}
        controls: dict[str, dict[str, Any]] = {}
        for one in [*_combinations(self.grid), *_listed(self.grid)]:
            ended = {name: None for by, name in _ENDS.items() if by in one and name not in one}
            whole = one | ended
            config = self._resolved(whole).config
            without = {n: v for n, v in whole.items() if n not in _OF_DISTILLATION}
            control = (
                without
                | {"alpha": 0.0}
                | dict.fromkeys(name for name in _OF_DISTILLATION if name != "alpha")
            )
            controls.setdefault(_trained(self._resolved(control).config), control)
            if not config.needs_teacher:
                continue
            earlier = tried.setdefault(_trained(config), whole)
            if earlier is not whole:
                raise UsageError(
                    f"trial {described(one)} trains the same as {described(earlier)}; keep one of"
                    " them"
                )
        return [*tried.values(), *controls.values()]

    @cached_property
    def trials(self) -> list[Trial]:
        """One for each setting and seed."""
        return [Trial(one, seed) for one in self.settings for seed in self.seeds]

    @property
    def needs_targets(self) -> bool:
        """Whether any trial is distilled."""
        return any(config.needs_teacher for config in self._configs)

    @cached_property
    def shares(self) -> list[str]:
        """The work of making the teacher's targets for all trials, see `shares_of`."""
        temperatures: set[float] = set()
        for config in self._configs:
            if config.needs_teacher:
                temperatures |= config.schedule_T.values()
        return shares_of(
            context=self._configs[0].context,
            temperatures=temperatures,
            target_bytes=self.base["target_bytes"],
            workers=self.base["target_workers"],
        )

    @property
    def parameters(self) -> dict[str, str]:
        """By name of a group: the ``PARAMS`` that train its settings in the whole pipeline."""
        return {Trial(one, 0).group: self._parameters_of(one) for one in self.settings}

    @cached_property
    def _configs(self) -> list[TrainConfig]:
        return [self._resolved(one).config for one in self.settings]

    def _resolved(self, settings: Mapping[str, Any]) -> Resolved:
        """A group's settings, checked as the training will check them."""
        whole = Trial(settings, self.seeds[0]).over(self.common)
        whole |= {"tokens_dir": "tokens", "teacher_targets": "targets"}
        try:
            resolved = resolve(given(**whole), {})
            return check_training(resolved, self.metric, self.processes, shapes=True)
        except UsageError as error:
            raise UsageError(f"trial {described(settings)}: {error}") from None

    def _check_count(self) -> None:
        for seed in self.seeds:
            TrainConfig(seed=seed)
        count = len(self.trials)
        if count > self.grid.max_trials:
            controls = len([one for one in self.settings if one.get("alpha") == 0.0])
            raise UsageError(
                f"{count} trials ({len(self.settings)} settings, {controls} of them controls, times"
                f" {len(self.seeds)} seeds) are more than max_trials: {self.grid.max_trials}; try"
                " fewer values, raise it, or give sample: N for a random part"
            )

    def _check_tokens(self) -> None:
        """Losses are compared at equal tokens, at the end as at each rung."""
        first: dict[str, int] = {}
        for settings in self.settings:
            values = self._resolved(settings).values
            update = values["global_batch"] * values["block_size"]
            steps = values["train_steps"]
            if self.grid.rungs and self.grid.rungs[-1] > steps:
                raise UsageError(f"rungs: {self.grid.rungs[-1]} is past the {steps} updates")
            now = {"": steps * update}
            now |= {" an update, where rungs are": update} if self.grid.rungs else {}
            first = first or now
            for words, tokens in now.items():
                if tokens != first[words]:
                    raise UsageError(
                        f"trial {described(settings)} trains on {tokens} tokens{words}, the first"
                        f" one on {first[words]}; losses are compared at equal tokens, so give"
                        " train_steps that make them equal"
                    )

    def _parameters_of(self, settings: Mapping[str, Any]) -> str:
        """The user's own parameters, and over them those that stand for a trial's settings."""
        names = {
            setting_of(rest): name
            for name in parameter_defaults()
            for stage, rest in [split_stage(name)]
            if stage == STAGE and rest != "more_settings"
        }
        config = self._resolved(settings).config
        chosen = dict(self.own) | {f"{STAGE}_train_steps": config.train_steps}
        more = dict(self.base[f"{STAGE}_more_settings"])
        for name, value in settings.items():
            if name in names:
                default = SETTINGS[name].default
                chosen[names[name]] = value if shown(value) else (0 if default is None else default)
            elif shown(value):
                more[name] = value
            else:
                more.pop(name, None)
        if more != self.base[f"{STAGE}_more_settings"]:
            chosen[f"{STAGE}_more_settings"] = more
        return " ".join(
            f"{name}={shlex.quote(json.dumps(value) if isinstance(value, dict) else str(value))}"
            for name, value in chosen.items()
        )


def _trained(config: TrainConfig) -> str:
    """What is trained, however it is written: two trials of which it is the same are one."""

    def levels(schedule: StepSchedule) -> list[tuple[int, float]]:
        steps = sorted({0, *(step for step, _ in schedule.entries if step < config.train_steps)})
        values = [(step, schedule.at(step)) for step in steps]
        return values[:1] + [now for last, now in itertools.pairwise(values) if now[1] != last[1]]

    effects: dict[str, Any] = dict.fromkeys((*_OF_DISTILLATION, "lr", "lr_peak"))
    effects["lr"] = config.peak_lr
    if config.needs_teacher:
        effects |= {"alpha": levels(config.schedule_alpha), "T": levels(config.schedule_T)}
        effects["kd_scheme"] = config.kd_scheme
    return json.dumps(config.run_settings() | effects, sort_keys=True)


def described(settings: Mapping[str, Any]) -> str:
    """A trial's settings in a line."""
    named = " ".join(f"{name}={value}" for name, value in settings.items() if shown(value))
    return named or "with the common settings"


def read_search(
    path: str, base: Mapping[str, Any], own: Mapping[str, Any], processes: int = 1
) -> Search:
    """The search that a file describes, checked as its trainings will check it.

    Args:
        path: of the grid.
        base: parameters of the pipeline, over its defaults.
        own: those of them that the user gave.
        processes: GPUs of a trial.

    Raises:
        UsageError: the file, a parameter or a trial is wrong; one line, which names it.
    """
    if not path:
        raise UsageError("missing: GRID (the search's YAML file, see docs/search.md)")
    whole = parameter_defaults() | dict(base)
    check_parameters(whole)
    return Search(read_grid(path), whole, own, path, processes)
