"""An estimate as people read it, and as JSON."""

from __future__ import annotations

import json
import math
import shlex
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pipelines.anneal import NAME
from pipelines.estimates.stages import Amount, Estimate, StageCost
from pipelines.parameters import parameter_defaults
from trainer.runtime.messages import duration, shortened

_WIDTH = 100
DEFAULTS = "parameters as by default:"
_BACKENDS = {"vertex": "Vertex AI", "kfp": "open-source Kubeflow Pipelines"}


def text(estimate: Estimate) -> str:
    """All lines: header, table, total, what is not known, parameters."""
    plan = estimate.plan
    prices = plan.prices
    place = _BACKENDS[plan.backend]
    if plan.backend == "vertex":
        place += f" in {plan.region}; prices of {prices.region}, as known in {prices.date}"
    lines = [f"estimate of {NAME} on {place} ({prices.source})", ""]
    lines += _table([_header(prices.currency), *(_cells(stage) for stage in estimate.stages)])
    lines += ["", *_totals(estimate), f"new: {plan.new}"]
    lines += [f"note: {note}" for note in estimate.notes]
    lines += ["", *_parameters(estimate)]
    return "\n".join(lines)


def _header(currency: str) -> tuple[str, ...]:
    return ("stage", "machine", "tokens", "time", currency, "how known")


def _cells(stage: StageCost) -> tuple[str, ...]:
    return (
        stage.title,
        stage.machine,
        tokens_text(stage.tokens),
        _seconds_of(stage.seconds()),
        _money_of(stage.price()),
        stage.known,
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows with columns of equal width, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (2, 3, 4)
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _totals(estimate: Estimate) -> list[str]:
    prices = estimate.plan.prices
    line = f"total: {_seconds_of(estimate.seconds())}, one stage after another"
    line += f" (from {_seconds_of(estimate.seconds(-1))} to {_seconds_of(estimate.seconds(1))})"
    without = [stage.title for stage in estimate.stages if stage.seconds() is None]
    line += f", without {', '.join(without)}" if without else ""
    if estimate.plan.backend != "vertex":
        return [line, "price: not known; the prices are those of Vertex AI's machines"]
    cost = f"price: {_money_of(estimate.price())} {prices.currency}"
    low, high = (_money_of(estimate.price(power)) for power in (-1, 1))
    cost += f" (from {low} to {high} by the times alone)"
    without = [stage.title for stage in estimate.stages if stage.price() is None]
    cost += f", without {', '.join(without)}" if without else ""
    starts = f"{prices.custom_job_start / 60:g} min for a GPU machine to start"
    return [
        line,
        cost,
        f"assumed: {starts}, {prices.task_start:g} s for another",
        "not counted: waiting for machines, work that is lost with them, downloads, disks, storage",
    ]


def _parameters(estimate: Estimate) -> list[str]:
    defaults, values = parameter_defaults(), estimate.plan.values
    other = {name: value for name, value in values.items() if value != defaults.get(name)}
    lines = ["parameters that differ from their defaults:"] if other else []
    lines += [f"  {_pair(name, value)}" for name, value in other.items()]
    lines.append(DEFAULTS)
    rest = " ".join(_pair(name, values[name]) for name in values if name not in other)
    wrapped = textwrap.wrap(
        rest,
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines + wrapped


def _pair(name: str, value: Any) -> str:
    """A parameter as ``PARAMS`` takes it, but for the end of a long one."""
    written = value if isinstance(value, str) else json.dumps(value)
    return f"{name}={shortened(shlex.quote(written))}"


def tokens_text(tokens: float | None) -> str:
    """``39.3 M``; ``?`` where the data set's size is not known."""
    if tokens is None:
        return "–"
    if math.isnan(tokens):
        return "?"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:.0f}"


def _seconds_of(amount: Amount | None) -> str:
    if amount is None:
        return "?"
    more = f" + {amount.per_token * 1e6:.2g} s/M" if amount.per_token else ""
    return rough_duration(amount.fixed) + more


def rough_duration(seconds: float) -> str:
    """No more digits than an estimate has: whole minutes, or tens of seconds below two."""
    whole = 60 if seconds >= 120 else 10
    return duration(whole * round(seconds / whole))


def _money_of(amount: Amount | None) -> str:
    if amount is None:
        return "?"
    more = f" + {amount.per_token * 1e6:.2g}/M" if amount.per_token else ""
    return f"{amount.fixed:.2f}{more}"


def as_json(estimate: Estimate) -> dict[str, Any]:
    """The same as JSON types: seconds, money, ``null`` for what is not known."""
    plan = estimate.plan
    stages = [
        {
            "title": stage.title,
            "machine": stage.machine,
            "tokens": None if stage.tokens is None or math.isnan(stage.tokens) else stage.tokens,
            "known": stage.known,
            **{name: _range(getattr(stage, name)) for name in ("seconds", "price")},
        }
        for stage in estimate.stages
    ]
    return {
        "backend": plan.backend,
        "region": plan.region,
        "prices": {
            "source": plan.prices.source,
            "date": plan.prices.date,
            "region": plan.prices.region,
            "currency": plan.prices.currency,
        },
        "stages": stages,
        "total": {name: _range(getattr(estimate, name)) for name in ("seconds", "price")},
        "new": plan.new,
        "notes": estimate.notes,
        "parameters": dict(plan.values),
    }


def _range(amount: Callable[[int], Amount | None]) -> dict[str, Any] | None:
    """As estimated, the least and the most, each a fixed part and one for each token."""
    found = {name: amount(power) for name, power in (("estimate", 0), ("low", -1), ("high", 1))}
    return {name: asdict(value) for name, value in found.items() if value is not None} or None
