"""The types that a run computes in."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer.models.teacher import PRECISIONS
from trainer.runtime.devices import choose_device, has_fp8
from trainer.runtime.errors import DeviceError, UsageError
from trainer.runtime.log import log
from trainer.runtime.messages import shortened
from trainer.settings.config import TrainConfig


@dataclass(frozen=True)
class Precision:
    """Device and compute types of student and teacher; the student's weights are always fp32."""

    device: torch.device
    compute: torch.dtype
    teacher: torch.dtype
    fp8_teacher: bool = False
    """Whether the teacher, loaded in bf16, multiplies in fp8 while training."""

    @property
    def loss_scaling(self) -> bool:
        """Whether gradients would underflow without scaling (fp16, Micikevicius et al., 2018)."""
        return self.compute == torch.float16

    def compiles(self, config: TrainConfig) -> bool:
        """Whether `torch.compile` is used: as ``--compile`` says; by default on a GPU."""
        if config.compile == "auto":
            return self.device.type == "cuda"
        return config.compile == "on"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which matrix products use the compute type."""
        if self.compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)


def _check_compiler(config: TrainConfig, device: torch.device) -> None:
    """Say what ``--compile=auto`` is here, and find what it takes on a CPU.

    Raises:
        UsageError: there is no C++ compiler.
    """
    if config.compile == "auto":
        log.info(
            "--compile=auto: %s", "on, for a GPU" if device.type == "cuda" else "off, on a CPU"
        )
    elif config.compile == "on" and device.type == "cpu":
        name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(name) is None:
            raise UsageError(
                f"--compile=on: on a CPU it needs a C++ compiler, and {name!r} is not here; install"
                " it, name another by CXX, or give --compile=off"
            )


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """Tell a failure of torch's compiler in one line.

    Raises:
        DeviceError: the compiler failed.
    """
    try:
        yield
    except Exception as error:  # the compilers' own share no class
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise DeviceError(
            f"torch.compile failed: {shortened(reason, 300)}; repair the compiler, or give"
            " --compile=off"
        ) from error


def choose_precision(config: TrainConfig, device: torch.device | None = None) -> Precision:
    """The precision that the settings give, else the device's best: bf16, fp16, fp32 on the CPU.

    Raises:
        UsageError: the device lacks the precision that the settings give, or the machine the
            compiler.
    """
    device = device or choose_device()
    gpu = device.type == "cuda"
    _check_compiler(config, device)
    if config.fp16 and not gpu:
        raise UsageError("--fp16 needs a GPU; leave it out to compute in fp32 on the CPU")
    if config.bf16 and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError(
            f"--bf16: {torch.cuda.get_device_name(device)} has no bfloat16; leave it out for fp16"
        )
    name = next((name for name in ("bf16", "fp16", "fp32") if getattr(config, name)), None)
    if name is None:
        native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if native else "fp16" if gpu else "fp32"
    compute = PRECISIONS[name]
    if config.teacher_precision == "fp8":
        if not has_fp8(device):
            raise UsageError(
                "--teacher_precision=fp8 needs an NVIDIA GPU of compute capability 8.9 or above,"
                " such as L4 or H100; use bf16"
            )
        return Precision(device, compute, torch.bfloat16, fp8_teacher=True)
    auto = config.teacher_precision == "auto"
    teacher = compute if auto else PRECISIONS[config.teacher_precision]
    if teacher == torch.float16 and not gpu:
        raise UsageError("--teacher_precision=fp16 needs a GPU; use fp32 or bf16 on the CPU")
    return Precision(device, compute, teacher)
