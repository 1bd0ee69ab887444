"""The pipeline's stages: the one table from which names, parameters and machines are derived.

A new stage is a module of ``trainer``, its component, a task in `pipelines.anneal` and a row here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SCHEDULING = {"standard": "STANDARD", "spot": "SPOT", "flex_start": "FLEX_START"}
"""How a custom job gets its machines, by Vertex AI's names."""

_LISTED = re.compile(r"[a-z0-9-]+:[A-Z0-9_]+:[1-9]\d{0,2}")


def described(default: Any, help: str, *, least: int | None = None, most: int | None = None) -> Any:
    """A dataclass field with the sentence that messages and the documentation show."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


def listed(machines: str) -> list[dict[str, Any]]:
    """The fields of a `Machine` that each entry of its ``machines`` gives.

    Raises:
        ValueError: an entry that is not ``TYPE:ACCELERATOR:COUNT``; says which.
    """
    entries = [entry.strip() for entry in machines.split(",") if entry.strip()]
    for entry in entries:
        if not _LISTED.fullmatch(entry):
            raise ValueError(entry)
    split = [entry.split(":") for entry in entries]
    return [
        {"machine_type": name, "accelerator_type": accelerator, "accelerator_count": int(count)}
        for name, accelerator, count in split
    ]


@dataclass(frozen=True)
class Machine:
    """What one stage runs on."""

    cpu: str = described("4", "CPU cores")
    memory: str = described("16Gi", "memory, with its unit")
    disk_gib: int = described(100, "boot disk in GiB (custom jobs)", least=10)
    disk_type: str = described(
        "", "type of the boot disk (custom jobs); empty is the service's choice"
    )
    machine_type: str = described("", "machine type of a custom job, e.g. a3-highgpu-1g")
    accelerator_type: str = described("", "on Vertex AI, e.g. NVIDIA_H100_80GB")
    accelerator_count: int = described(0, "GPUs of each machine; 0 is none", least=0)
    replicas: int = described(1, "machines", least=1)
    machines: str = described(
        "", "instead, TYPE:ACCELERATOR:COUNT, …: the first that the quota has room for is taken"
    )
    scheduling: str = described(
        "standard", "spot: cheaper, may be taken away; flex_start: waits for free machines"
    )
    max_wait_hours: int = described(
        24, "longest wait of flex_start; 0 is without end", least=0, most=365 * 24
    )
    retries: int = described(3, "times the platform starts the stage again", least=0)
    backoff_seconds: int = described(60, "wait before the first retry; doubles each time", least=0)
    timeout_hours: int = described(24, "hours after which a custom job is stopped", least=1)

    @property
    def alternatives(self) -> tuple[Machine, ...]:
        """Itself on each of `machines`, in their order; itself alone where none are listed."""
        return tuple(replace(self, **fields) for fields in listed(self.machines)) or (self,)

    @property
    def gpu(self) -> bool:
        """Whether the stage asks for GPUs."""
        return bool(self.accelerator_type and self.accelerator_count)

    @property
    def family(self) -> str:
        """The machine type without its size, ``a2-highgpu`` of ``a2-highgpu-1g``."""
        return "-".join(self.machine_type.split("-")[:2])


_GPU = Machine(
    cpu="12",
    memory="85Gi",
    disk_gib=200,
    machine_type="a2-highgpu-1g",
    accelerator_type="NVIDIA_TESLA_A100",
    accelerator_count=1,
    timeout_hours=72,
)


@dataclass(frozen=True)
class Stage:
    """One stage."""

    key: str
    """What code calls it; its parameters start with it."""
    title: str
    """What users see: in the UI, in pictures, in the output of every command."""
    machine: Machine
    """What it runs on by default."""
    trains: bool = False
    """Whether it trains, and so may take several machines."""
    shares_machine_of: str = ""
    """The stage whose machine it uses; empty: it has one of its own."""
    configurable: bool = False
    """Whether any setting of the trainer may be given for it, in ``{key}_more_settings``."""
    only_if_teacher: str = ""
    """The value that the parameter ``teacher`` must have; empty: it always runs."""
    only_with: tuple[str, ...] = ()
    """Parameters that must not be empty or false for it to run."""
    setting: str = ""
    """The setting of the pipeline that adds it, on Vertex AI; empty: it is always there."""
    fans_out: bool = False
    """Whether several tasks share its work; one that is lost starts again on every backend."""

    def runs_with(self, parameters: Mapping[str, Any]) -> bool:
        """Whether it runs with these values of the pipeline's parameters."""
        teacher = self.only_if_teacher in ("", parameters["teacher"])
        return teacher and all(parameters[name] for name in self.only_with)

    @property
    def machine_name(self) -> str:
        """How names of its machine's settings start; it has no underscore, where they go on."""
        name = self.shares_machine_of or self.key
        assert "_" not in name
        return name


ONLINE, CACHED = "online", "cached"
"""What the parameter ``teacher`` may be."""

_PICKING = Machine(cpu="1", memory="4Gi")
_STUDENT = Machine(cpu="2", memory="16Gi")
"""Holds a student's weights a few times over."""


def _light(key: str, title: str, **more: Any) -> Stage:
    """A stage that reads and writes little, on the machine of those that pick."""
    return Stage(key, title, _PICKING, shares_machine_of="pick", **more)


STAGES = {
    stage.key: stage
    for stage in (
        Stage("prepare", "prepare", Machine(cpu="8", memory="32Gi")),
        _light("plan", "plan-targets", only_if_teacher=CACHED),
        Stage("targets", "teacher-targets", _GPU, only_if_teacher=CACHED, fans_out=True),
        _light("join", "join-targets", only_if_teacher=CACHED),
        _light("online", "teacher-online", only_if_teacher=ONLINE),
        Stage("anneal", "anneal", _GPU, trains=True, configurable=True),
        Stage("pick", "pick-best-annealed", _PICKING),
        Stage("resize", "resize-and-reset", _STUDENT),
        Stage("continue", "continue", _GPU, trains=True, configurable=True),
        _light("pick_again", "pick-best-continued"),
        Stage("evaluate", "evaluate", _GPU, configurable=True),
        Stage("export", "export", _STUDENT, shares_machine_of="resize", only_with=("export",)),
        Stage(
            "lm_eval",
            "lm-eval",
            _GPU,
            shares_machine_of="evaluate",
            only_with=("export", "lm_eval_tasks"),
        ),
        _light("register", "register", only_with=("export",), setting="model_name"),
    )
}
"""By key, in the order in which they run."""
DEFAULT_MACHINES = {stage.machine_name: stage.machine for stage in STAGES.values()}
