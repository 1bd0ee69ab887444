"""The file of prices: what machines cost by the hour, and how long the platform takes to start."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipelines
from pipelines.settings import nearest
from pipelines.stages import Machine
from trainer.runtime.errors import UsageError
from trainer.runtime.messages import brief
from trainer.settings.text_yaml import read_settings

PRICES = Path(str(pipelines.__file__)).with_name("prices.yaml")

_DATE = re.compile(r"\d{4}-\d{2}(-\d{2})?")
_TEXTS = ("date", "region", "currency")
_NUMBERS = ("vertex_fee", "run", "custom_job_start", "task_start")
_ALL = (*_TEXTS, *_NUMBERS, "machines", "accelerators")
_MOST = 1e6
_GIB = {"": 2.0**-30, "K": 1e3 / 2**30, "M": 1e6 / 2**30, "G": 1e9 / 2**30, "T": 1e12 / 2**30}
_GIB |= {f"{unit}i": 2.0 ** (10 * power - 30) for power, unit in enumerate("KMGTPE", start=1)}
_GIB |= {"P": 1e15 / 2**30, "E": 1e18 / 2**30}


@dataclass(frozen=True)
class Price:
    """A machine's price by the hour, or that of one GPU, and what the machine has."""

    on_demand: float
    spot: float | None = None
    accelerator: str = ""
    """The GPUs that the price includes, by Vertex AI's name; empty where it includes none."""
    cpu: float = 0.0
    """CPU cores; 0 where plain tasks do not get the machine."""
    memory_gib: float = 0.0


@dataclass(frozen=True)
class Prices:
    """What a file of prices holds."""

    source: str
    """The file's name, for messages."""
    date: str
    region: str
    currency: str
    vertex_fee: float
    """Vertex AI's price over that of Compute Engine."""
    run: float
    """Price of a run beside its machines."""
    custom_job_start: float
    """Seconds until a custom job runs."""
    task_start: float
    """Seconds until a plain task runs."""
    machines: Mapping[str, Price]
    accelerators: Mapping[str, Price]

    def hourly(self, machine: Machine) -> float | None:
        """What all machines of a stage cost on Vertex AI for an hour; None: a price is missing.

        Those of flex start count as on demand.
        """
        if not machine.gpu:
            found = self.plain(machine)
            return self.vertex_fee * self.machines[found].on_demand if found else None
        base = self.machines.get(machine.machine_type)
        if base is None:
            return None
        parts = [(base, 1)]
        if base.accelerator != machine.accelerator_type:
            gpu = self.accelerators.get(machine.accelerator_type)
            if gpu is None or base.accelerator:
                return None
            parts.append((gpu, machine.accelerator_count))
        spot = machine.scheduling == "spot"
        each = [(part.spot if spot else part.on_demand, count) for part, count in parts]
        if any(price is None for price, _ in each):
            return None
        total = sum(price * count for price, count in each if price is not None)
        return self.vertex_fee * machine.replicas * total

    def plain(self, machine: Machine) -> str:
        """The cheapest machine type for a plain task; empty where none is large enough."""
        cpu, memory = cores(machine), gib(machine)
        fitting = [
            (price.on_demand, name)
            for name, price in self.machines.items()
            if price.cpu >= cpu and price.memory_gib >= memory
        ]
        return min(fitting, default=(0.0, ""))[1]


def cores(machine: Machine) -> float:
    """CPU cores of a plain task."""
    text = machine.cpu
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def gib(machine: Machine) -> float:
    """Memory of a plain task in GiB."""
    digits = re.match(r"\d*", machine.memory)
    assert digits is not None
    return float(digits[0]) * _GIB[machine.memory[digits.end() :]]


def read_prices(path: str = "") -> Prices:
    """The prices of a file; an empty path is the package's own.

    Raises:
        UsageError: it cannot be read, or something in it is missing, unknown or no number, in one
            line.
    """
    name = f"PRICES={path!r}" if path else str(PRICES.name)
    content = read_settings(path or PRICES, name)
    for key in content:
        if key not in _ALL:
            raise UsageError(f"{name}: unknown entry {brief(key)}{nearest(str(key), _ALL)}")
    missing = [key for key in _ALL if content.get(key) is None]
    if missing:
        raise UsageError(f"{name}: missing: {', '.join(missing)}; see pipelines/prices.yaml")
    for key in _TEXTS:
        if not isinstance(content[key], str):
            raise UsageError(f"{name}: {key}: a text is needed")
    if not _DATE.fullmatch(content["date"]):
        raise UsageError(f"{name}: date={brief(content['date'])}: write it as 2026-11")
    numbers = {key: _number(content[key], f"{name}: {key}") for key in _NUMBERS}
    if numbers["vertex_fee"] < 1.0:
        raise UsageError(f"{name}: vertex_fee={numbers['vertex_fee']:g} must be at least 1")
    return Prices(
        source=path or PRICES.name,
        date=content["date"],
        region=content["region"],
        currency=content["currency"],
        vertex_fee=numbers["vertex_fee"],
        run=numbers["run"],
        custom_job_start=numbers["custom_job_start"],
        task_start=numbers["task_start"],
        machines=_table(content["machines"], f"{name}: machines"),
        accelerators=_table(content["accelerators"], f"{name}: accelerators"),
    )


def _table(content: Any, where: str) -> dict[str, Price]:
    if not isinstance(content, dict):
        raise UsageError(f"{where}: 'NAME: {{on_demand: …}}' lines are needed")
    return {name: _price(entry, f"{where}: {name}") for name, entry in content.items()}


def _price(entry: Any, where: str) -> Price:
    if not isinstance(entry, dict):
        raise UsageError(f"{where}={brief(entry)}: write it as {{on_demand: 1.50, spot: 0.60}}")
    known = tuple(Price.__dataclass_fields__)
    for key in entry:
        if key not in known:
            raise UsageError(f"{where}: unknown entry {brief(key)}{nearest(str(key), known)}")
    if entry.get("on_demand") is None:
        raise UsageError(f"{where}: on_demand is missing, the price of an hour")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key == "accelerator" and isinstance(value, str):
            values[key] = value
        elif value is not None:
            values[key] = _number(value, f"{where}: {key}")
    return Price(**values)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{where}={brief(value)}: a number is needed") from None
    if not (math.isfinite(number) and 0.0 <= number <= _MOST):
        raise UsageError(f"{where}={brief(value)} must be from 0 to {_MOST:g}")
    return number
