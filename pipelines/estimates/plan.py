"""A run before it starts: which stages, on which machines, with which parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.estimates.prices import Prices, read_prices
from pipelines.parameters import parameter_defaults
from pipelines.settings import Settings
from pipelines.stages import STAGES, Machine

_CACHE = (
    "not known before the run; what the cache has from earlier ones costs nothing, but is counted"
)


@dataclass(frozen=True)
class Plan:
    """A run, before it starts."""

    backend: str
    """``vertex`` or ``kfp``."""
    region: str
    stages: Sequence[tuple[str, str]]
    """Key and title of each stage that would run; the key is empty for one of another release."""
    machines: Mapping[str, Machine]
    """By a stage's key."""
    values: Mapping[str, Any]
    """Every parameter."""
    prices: Prices
    new: str
    """Which of the stages are known to be new."""


def plan_of_run(
    settings: Settings, parameters: Mapping[str, Any], backend: str, *, cache: bool
) -> Plan:
    """The run that a submission would create.

    Args:
        settings: machines, region and the file of prices.
        parameters: of the pipeline, over its defaults; checked already.
        backend: ``vertex`` or ``kfp``.
        cache: whether stages may come from the platform's cache.

    Raises:
        UsageError: the file of prices is wrong.
    """
    values = parameter_defaults() | dict(parameters)
    return Plan(
        backend=backend,
        region=settings.region,
        stages=[
            (stage.key, stage.title)
            for stage in STAGES.values()
            if stage.runs_with(values)
            if not stage.setting or getattr(settings, stage.setting)
        ],
        machines={stage.key: settings.machines[stage.machine_name] for stage in STAGES.values()},
        values=values,
        prices=read_prices(settings.prices),
        new=_CACHE if cache else "all stages, by CACHE=0",
    )
