"""Which GPUs a Google machine type carries, so that a pair that no machine has is never sent.

The table is that of https://cloud.google.com/compute/docs/gpus ("GPU machine types"), as of
2025-11; accelerators have the names that Vertex AI gives them. A new family is one more entry of
`BUILT_IN`; a family that is in no table is left to the service, which may know it already.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.runtime.errors import UsageError
from trainer.runtime.log import log
from trainer.runtime.near_names import near_name


@dataclass(frozen=True)
class BuiltIn:
    """The GPUs that the machine types of a family come with."""

    accelerator: str
    counts: dict[str, int]
    """By the end of a type's name, behind the family: its number of GPUs."""


def _by_name(accelerator: str, *counts: int) -> BuiltIn:
    """Types whose names tell the number: ``a2-highgpu-4g``."""
    return BuiltIn(accelerator, {f"{count}g": count for count in counts})


BUILT_IN = {
    "a2-highgpu": _by_name("NVIDIA_TESLA_A100", 1, 2, 4, 8),
    "a2-megagpu": _by_name("NVIDIA_TESLA_A100", 16),
    "a2-ultragpu": _by_name("NVIDIA_A100_80GB", 1, 2, 4, 8),
    "a3-highgpu": _by_name("NVIDIA_H100_80GB", 1, 2, 4, 8),
    "a3-edgegpu": _by_name("NVIDIA_H100_80GB", 8),
    "a3-megagpu": _by_name("NVIDIA_H100_MEGA_80GB", 8),
    "a3-ultragpu": _by_name("NVIDIA_H200_141GB", 8),
    "a4-highgpu": _by_name("NVIDIA_B200", 8),
    "a4x-highgpu": _by_name("NVIDIA_GB200", 4),
    "g2-standard": BuiltIn(
        "NVIDIA_L4", {"4": 1, "8": 1, "12": 1, "16": 1, "24": 2, "32": 1, "48": 4, "96": 8}
    ),
    "g4-standard": BuiltIn("NVIDIA_RTX_PRO_6000", {"48": 1, "96": 2, "192": 4, "384": 8}),
}
"""By family."""
ATTACHED = {
    "NVIDIA_TESLA_T4": {1: 48, 2: 48, 4: 96},
    "NVIDIA_TESLA_P4": {1: 24, 2: 48, 4: 96},
    "NVIDIA_TESLA_V100": {1: 12, 2: 24, 4: 48, 8: 96},
    "NVIDIA_TESLA_P100": {1: 16, 2: 32, 4: 96},
}
"""Accelerators that N1 machines take: by how many of them, the most vCPUs that go with it."""
WITHOUT = re.compile(r"(?:c2d?|c3d?|c4[ad]?|e2|h3|m[123]|n2d?|n4|t2[ad]|z3)-.*")
"""Machine types that take no GPU."""

_N1 = re.compile(r"n1-(?:standard|highmem|highcpu)-(\d+)")
_VARIANT = re.compile(r"-nolssd$")
"""The same machine with other disks."""


def check_pair(stage: str, machine_type: str, accelerator: str, count: int) -> None:
    """Refuse a machine type that does not carry these GPUs; one of an unknown family is logged.

    Args:
        stage: how the names of the stage's settings begin, for messages.
        machine_type: for example ``a2-highgpu-1g``.
        accelerator: by Vertex AI's name.
        count: of each machine.

    Raises:
        UsageError: naming the settings, and what fits.
    """
    family, _, size = _VARIANT.sub("", machine_type).rpartition("-")
    pair = f"{stage}_MACHINE_TYPE={machine_type}"
    if built_in := BUILT_IN.get(family):
        _check_built_in(stage, pair, family, size, built_in, accelerator, count)
    elif machine_type.startswith("n1-"):
        _check_attached(stage, pair, machine_type, accelerator, count)
    elif WITHOUT.fullmatch(machine_type):
        raise UsageError(f"{pair} takes no GPU; {_fitting(stage, accelerator, count)}")
    else:
        near = near_name(machine_type, all_types())
        log.info(
            "%s is of no family known here%s; whether it carries %d x %s is left to Vertex AI",
            pair,
            f" (did you mean {near}?)" if near else "",
            count,
            accelerator,
        )


def all_types() -> list[str]:
    """Every machine type that comes with GPUs."""
    return [f"{family}-{size}" for family, one in BUILT_IN.items() for size in one.counts]


def _check_built_in(
    stage: str, pair: str, family: str, size: str, built_in: BuiltIn, accelerator: str, count: int
) -> None:
    inside = built_in.counts.get(size)
    if inside is None:
        types = ", ".join(f"{family}-{size}" for size in built_in.counts)
        raise UsageError(f"{pair}: there is no such type; choose one of {types}")
    if built_in.accelerator != accelerator:
        raise UsageError(
            f"{pair} carries {inside} x {built_in.accelerator}, not"
            f" {stage}_ACCELERATOR_TYPE={accelerator}; {_fitting(stage, accelerator, count)}"
        )
    if inside != count:
        others = [f"{family}-{size}" for size, number in built_in.counts.items() if number == count]
        larger = f", or {stage}_MACHINE_TYPE={' or '.join(others)}" if others else ""
        raise UsageError(
            f"{stage}_ACCELERATOR_COUNT={count}, but {pair} has {inside}; give"
            f" {stage}_ACCELERATOR_COUNT={inside}{larger}"
        )


def _check_attached(stage: str, pair: str, machine_type: str, accelerator: str, count: int) -> None:
    sized = _N1.fullmatch(machine_type)
    if sized is None:
        raise UsageError(f"{pair} takes no GPU; {_fitting(stage, accelerator, count)}")
    if accelerator not in ATTACHED:
        raise UsageError(
            f"{pair} cannot carry {stage}_ACCELERATOR_TYPE={accelerator}, but"
            f" {', '.join(ATTACHED)}; {_fitting(stage, accelerator, count)}"
        )
    cpus, most = int(sized[1]), ATTACHED[accelerator]
    fitting = [number for number, limit in most.items() if cpus <= limit]
    if count not in fitting:
        numbers = ", ".join(map(str, fitting))
        raise UsageError(
            f"{stage}_ACCELERATOR_COUNT={count}: {machine_type} takes {numbers or 'none'} of"
            f" {accelerator}; {_fitting(stage, accelerator, count)}"
        )


def _fitting(stage: str, accelerator: str, count: int) -> str:
    """What carries the accelerator, this many of them where there is such a machine."""
    if limits := ATTACHED.get(accelerator):
        cpus = limits.get(count)
        if cpus is None:
            return f"give {stage}_ACCELERATOR_COUNT of {' or '.join(map(str, limits))}"
        return f"{count} of them fit into n1 machines of at most {cpus} vCPUs, as n1-standard-8"
    carrying = {
        f"{family}-{size}": number
        for family, one in BUILT_IN.items()
        for size, number in one.counts.items()
        if one.accelerator == accelerator
    }
    exact = [name for name, number in carrying.items() if number == count]
    if exact:
        return f"give {stage}_MACHINE_TYPE={' or '.join(exact)}"
    listed = ", ".join(f"{name} ({number})" for name, number in carrying.items())
    return f"{accelerator} comes with {listed}" if listed else "give another of either"
