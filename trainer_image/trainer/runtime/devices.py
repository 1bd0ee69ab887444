"""The GPUs of a machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainer.runtime.errors import DeviceError

if TYPE_CHECKING:
    import torch

EXPECTED_GPUS = "EXPECTED_GPUS"
"""Variable of the environment that tells how many GPUs a machine was asked to have."""


def count_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """GPUs that torch can use.

    Raises:
        DeviceError: fewer than ``EXPECTED_GPUS``. Where a driver is missing or too old torch sees
            none, and a run would go on on the CPU of a machine that is paid for its GPUs.
    """
    import torch

    # The count alone may be the driver's, which need not be one that torch can use
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    expected = environ.get(EXPECTED_GPUS, "")
    if expected.isdecimal() and int(expected) > found:
        raise DeviceError(
            f"torch can use {found} GPUs here, but this machine should have {expected}"
            f" ({EXPECTED_GPUS}); check that its driver is there and new enough for CUDA"
            f" {torch.version.cuda}"
        )
    return found


def choose_device(environ: Mapping[str, str] = os.environ) -> torch.device:
    """The GPU where there is one, else the CPU.

    Raises:
        DeviceError: fewer GPUs than the machine was asked to have.
    """
    import torch

    return torch.device("cuda" if count_gpus(environ) else "cpu")
