"""Runs against each other: in which settings they differ, and what that did to their losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from trainer.reports.amounts import NOTHING, count, nats, signed_nats, whole
from trainer.reports.curves import value_at
from trainer.reports.drawing import COLOURS, DASHES, MUTED, Line, plot
from trainer.reports.run_plots import Plots
from trainer.reports.runs import Run
from trainer.reports.tables import Column, Table
from trainer.runtime.strict_json import dumps
from trainer.settings.config import SETTINGS

SEED = "seed"

_PLACES = ("output_gcs_uri", "local_workdir", "cache_dir", "config", "compile_cache")
"""Settings that differ between any two runs and say nothing of them."""

_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the tokens that every run has come to, where the losses are compared."""

_MOST_LABELS = 10
"""Curves with a label at their end; more would not fit."""


@dataclass(frozen=True)
class Key:
    """What tells a run's curve from the others."""

    label: str
    name: str
    colour: str
    dash: str


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: Sequence[Run]

    @property
    def seeds(self) -> int:
        """How many there are; a run that was repeated with its seed is no other one."""
        return len({_seed(run) for run in self.runs})

    def losses(self, context: int, tokens: float) -> list[float]:
        """The student's losses at as many tokens, in nats, one a seed that came so far.

        Of runs with the same seed it is their mean: they tell nothing of the spread over seeds.
        """
        by_seed: dict[str, list[float]] = {}
        for run in self.runs:
            loss = value_at(run.validation("student", context), tokens)
            if loss is not None:
                by_seed.setdefault(_seed(run), []).append(loss)
        return [_mean(losses) for losses in by_seed.values()]


@dataclass(frozen=True)
class RunsCompared:
    """Runs against each other."""

    runs: Sequence[Run]

    @cached_property
    def contexts(self) -> list[int]:
        """Those that at least two runs were evaluated at, in tokens."""
        every = [context for run in self.runs for context in run.contexts]
        return sorted(context for context in set(every) if every.count(context) > 1)

    @cached_property
    def differing(self) -> list[str]:
        """The settings in which the runs differ, but for places."""
        names = dict.fromkeys(setting.name for run in self.runs for setting in run.settings)
        return [
            name
            for name in names
            if name not in _PLACES
            and not (name in SETTINGS and SETTINGS[name].metadata["secret"])
            and len({dumps(run.setting(name)) for run in self.runs}) > 1
        ]

    @cached_property
    def groups(self) -> list[Group]:
        """Runs that differ in the seed alone together, named by what else differs."""
        members: dict[str, list[Run]] = {}
        for run in self.runs:
            members.setdefault(_identity(run), []).append(run)
        defining = [name for name in self.differing if _defines(name) and name != SEED]
        groups = []
        for runs in members.values():
            named = ", ".join(f"{name}={_shown(runs[0], name)}" for name in defining)
            groups.append(Group(named or runs[0].name, runs))
        names = [group.name for group in groups]
        return [
            group if names.count(group.name) == 1 else Group(f"{group.name} ({number})", group.runs)
            for number, group in enumerate(groups, 1)
        ]

    def common_tokens(self, context: int) -> float | None:
        """The tokens up to which every run evaluated at a context has come; None without any."""
        curves = [run.validation("student", context) for run in self.runs]
        ends = [curve[-1][0] for curve in curves if curve]
        return min(ends) if len(ends) > 1 else None

    @cached_property
    def keys(self) -> list[Key]:
        """How each run's curve is drawn."""
        return [
            Key(
                str(number + 1),
                run.name,
                COLOURS[number % len(COLOURS)],
                DASHES[number // len(COLOURS) % len(DASHES)],
            )
            for number, run in enumerate(self.runs)
        ]

    # ── what is shown ─────────────────────────────────────────────────────────────────────────

    def tables(self) -> list[Table]:
        """Settings, losses at equal tokens, groups; those without a row are left out."""
        tables = [self._settings(), *map(self._losses, self.contexts)]
        tables += [self._spread(context) for context in self.contexts]
        return [table for table in tables if table.rows]

    def _settings(self) -> Table:
        columns = [Column(""), Column("run", numeric=False)]
        columns += [Column(name, numeric=False) for name in self.differing]
        rows = [
            [key.label, run.name, *(_shown(run, name) for name in self.differing)]
            for key, run in zip(self.keys, self.runs, strict=True)
        ]
        notes = [] if self.differing else ["The runs differ in no setting but in their places."]
        return Table("Settings in which the runs differ", columns, rows, notes=notes)

    def _losses(self, context: int) -> Table:
        end = self.common_tokens(context)
        tokens = [] if end is None else [share * end for share in _SHARES]
        columns = [Column(""), Column("run", numeric=False)]
        columns += [Column(f"at {count(at)}") for at in tokens]
        columns += [Column("best"), Column("at"), Column("teacher"), Column("tokens evaluated on")]
        rows = []
        for key, run in zip(self.keys, self.runs, strict=True):
            curve = run.validation("student", context)
            known = [(loss, at) for at, loss in curve if not math.isnan(loss)]
            best, best_at = min(known) if known else (None, None)
            losses = [nats(value_at(curve, at)) for at in tokens]
            ends = [nats(best), count(best_at), nats(run.teacher_loss(context))]
            rows.append([key.label, run.name, *losses, *ends, whole(run.evaluated_on(context)[0])])
        notes = [
            "Tokens are those trained on. Between two evaluations a loss is read from the straight"
            " line; before the first there is none."
        ]
        title = f"Validation loss at context {context} in nats, at equal tokens"
        return Table(title, columns, rows, notes=notes)

    def _spread(self, context: int) -> Table:
        end = self.common_tokens(context)
        columns = [Column("group", numeric=False), Column("seeds"), Column("mean")]
        columns += [Column("lowest"), Column("highest"), Column("spread")]
        columns.append(Column("against the best", numeric=False))
        title = f"Groups of runs that differ in the seed alone, context {context}"
        if end is None or len(self.groups) == len(self.runs) == 1:
            return Table(title, columns, [])
        losses = [(group, group.losses(context, end)) for group in self.groups]
        known = [(group, found) for group, found in losses if found]
        if not known:
            return Table(title, columns, [])
        # One of which a seed has no loss here, for it diverged, is behind those that are whole
        best = min(known, key=lambda one: (len(one[1]) < one[0].seeds, _mean(one[1])))[1]
        rows = [
            [
                group.name,
                f"{len(found)}" + f" of {group.seeds}" * (len(found) < group.seeds),
                nats(_mean(found)),
                nats(min(found)),
                nats(max(found)),
                nats(max(found) - min(found)) if len(found) > 1 else NOTHING,
                self._against(found, best),
            ]
            for group, found in known
        ]
        return Table(title, columns, rows, notes=[f"Losses in nats at {count(end)} tokens."])

    def _against(self, losses: Sequence[float], best: Sequence[float]) -> str:
        if not self._one_tokenizer:
            return NOTHING
        return "the best" if losses is best else _verdict(losses, best)

    @cached_property
    def _one_tokenizer(self) -> bool:
        return len({run.tokenizer_identity for run in self.runs}) == 1

    def plots(self) -> list[Plots]:
        """Curves over one another, by tokens trained on."""
        end = max((run.tokens for run in self.runs), default=0.0)
        labelled = len(self.runs) <= _MOST_LABELS
        validation = []
        for context in self.contexts:
            lines = self._lines([run.validation("student", context) for run in self.runs])
            lines += self._teacher(context, lines, end)
            title = f"Validation loss at context {context}"
            validation.append(plot(title, "nats", lines, end=end, labelled=labelled))
        training = [
            plot(
                title,
                "nats",
                self._lines([run.training(name) for run in self.runs]),
                end=end,
                labelled=labelled,
            )
            for name, title in (("loss", "Loss"), ("ce", "Cross entropy"), ("kd", "Distillation"))
        ]
        groups = (("Validation", validation), ("Training", training))
        shown = [Plots(name, [one for one in plots if one is not None]) for name, plots in groups]
        return [group for group in shown if group.plots]

    def _teacher(self, context: int, lines: Sequence[Line], end: float) -> list[Line]:
        """The teacher's line, where all runs have one and it does not press the curves together."""
        losses = {run.teacher_loss(context) for run in self.runs}
        heights = [y for line in lines for _, y in line.points if not math.isnan(y)]
        if len(losses) != 1 or None in losses or not heights:
            return []
        (loss,) = (loss for loss in losses if loss is not None)
        if loss < min(heights) - (max(heights) - min(heights)):
            return []
        return [Line("teacher", [(0.0, loss), (end, loss)], MUTED, "dashed")]

    def _lines(self, curves: Sequence[Sequence[tuple[float, float]]]) -> list[Line]:
        return [
            Line(key.label, curve, key.colour, key.dash)
            for key, curve in zip(self.keys, curves, strict=True)
        ]

    def warnings(self) -> list[str]:
        """Sentences on what a reader of the tables should know."""
        told = []
        if not self._one_tokenizer:
            told.append(
                "The runs have different tokenizers: their losses are per token of each, and cannot"
                " be compared."
            )
        if not self.contexts:
            told.append("No two runs were evaluated at the same context: no loss can be compared.")
        told += [text for context in self.contexts for text in self._of_a_context(context)]
        told += [f"{run.name} has not ended." for run in self.runs if run.record.end is None]
        if len({run.tokens_identity for run in self.runs}) > 1:
            told.append(
                "The runs were trained on different tokens; where they were evaluated on different"
                " ones too, their losses differ by that."
            )
        if any(len({run.start for run in group.runs}) > 1 for group in self.groups):
            told.append(
                "Runs that differ in the seed alone began at different checkpoints: the spread over"
                " seeds holds that too."
            )
        return told

    def _of_a_context(self, context: int) -> Iterator[str]:
        runs = [run for run in self.runs if context in run.contexts]
        numbers = {run.evaluated_on(context)[0] for run in runs}
        if len(numbers) > 1:
            shown = ", ".join(sorted({whole(tokens) for tokens in numbers}))
            yield (
                f"At context {context} the runs were evaluated on different numbers of tokens"
                f" ({shown}): their losses differ by that too."
            )
        elif len({run.evaluated_on(context) for run in runs}) > 1:
            yield (
                f"At context {context} the runs were evaluated on validation splits of different"
                " lengths: their losses differ by that too."
            )
        end = self.common_tokens(context)
        if end is None:
            return
        for run in runs:
            if value_at(run.validation("student", context), end) is None:
                yield (
                    f"At context {context} {run.name} has no finite loss at {count(end)} tokens: it"
                    " is left out there."
                )


def short_names(locations: Sequence[str]) -> list[str]:
    """What tells locations apart: their paths without the parts that all begin and end with."""
    paths = [location.rstrip("/").split("/") for location in locations]
    shortest = min(len(path) for path in paths)
    first = last = 0
    while first < shortest and len({path[first] for path in paths}) == 1:
        first += 1
    while last < shortest - first and len({path[-1 - last] for path in paths}) == 1:
        last += 1
    names = ["/".join(path[first : len(path) - last]) for path in paths]
    return [name or location for name, location in zip(names, locations, strict=True)]


def _defines(name: str) -> bool:
    return name not in SETTINGS or bool(SETTINGS[name].metadata["defines_run"])


def _identity(run: Run) -> str:
    """What two runs share that differ in their seed alone."""
    settings = {
        setting.name: run.setting(setting.name)
        for setting in run.settings
        if _defines(setting.name) and setting.name != SEED
    }
    return dumps([dict(sorted(settings.items())), run.tokens_identity])


def _seed(run: Run) -> str:
    return dumps(run.setting(SEED))


def _shown(run: Run, name: str) -> str:
    return next((setting.value for setting in run.settings if setting.name == name), NOTHING)


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _verdict(losses: Sequence[float], best: Sequence[float]) -> str:
    """How a group's losses lie to those of the best one, measured by the spread over seeds."""
    difference = _mean(losses) - _mean(best)
    shown = f"{signed_nats(difference)} nats"
    spreads = [max(found) - min(found) for found in (losses, best) if len(found) > 1]
    if not spreads:
        return f"{shown}; one seed each, so the spread over seeds is not known"
    spread = max(spreads)
    if difference <= spread:
        return f"{shown}, within the spread over seeds of {nats(spread)}: they are not told apart"
    return f"{shown}, more than the spread over seeds of {nats(spread)}"
