"""The GPUs of a machine and its memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.runtime.ahead import Ahead
from trainer.runtime.errors import DeviceError

if TYPE_CHECKING:
    import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
"""Where Linux tells a container's limit, in bytes or ``max``, and how much of it is in use."""
EXPECTED_GPUS = "EXPECTED_GPUS"
"""Environment variable with the number of GPUs that the machine was ordered with."""


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that torch can use.

    Raises:
        DeviceError: fewer than ``EXPECTED_GPUS``. With a driver missing or too old, torch sees
            none, and a run would use the CPU of a machine whose GPUs are paid for.
    """
    import torch

    # device_count alone may ask a driver that torch cannot use
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    expected = environ.get(EXPECTED_GPUS, "")
    if expected.isdecimal() and int(expected) > usable:
        raise DeviceError(
            f"torch can use {usable} GPUs here, but this machine should have {expected}"
            f" ({EXPECTED_GPUS}); check that its driver is there and new enough for CUDA"
            f" {torch.version.cuda}"
        )
    return usable


def choose_device(environ: Mapping[str, str] = os.environ) -> torch.device:
    """The GPU where there is one, else the CPU.

    Raises:
        DeviceError: fewer GPUs than the machine was ordered with.
    """
    import torch

    return torch.device("cuda" if count_gpus(environ) else "cpu")


def wake(device: torch.device) -> None:
    """Let a GPU get ready in the background, which takes seconds; failures show at its use."""
    import torch

    def begin() -> None:
        with contextlib.suppress(RuntimeError):
            torch.zeros((), device=device)

    if device.type == "cuda":
        Ahead("device", begin)


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies fp8 numbers: NVIDIA, of compute capability 8.9 or above."""
    import torch

    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def free_memory() -> int | None:
    """Bytes that this process may still take; None where the system does not tell."""
    found = []
    try:
        described = Path("/proc/meminfo").read_text().splitlines()
        lines = dict(line.split(":", 1) for line in described)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, ValueError, KeyError):
        pass  # not Linux
    for limit, used in _CGROUPS:
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such controller, or no limit
    return min(found, default=None)
