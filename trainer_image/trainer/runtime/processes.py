"""Several processes, one per GPU, by torch's own means: torchrun, DDP and FSDP2."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler

from trainer.runtime.devices import choose_device, count_gpus
from trainer.runtime.errors import LiquidError, Preempted, TrainingError, UsageError
from trainer.runtime.log import log
from trainer.runtime.signals import GRACE_SECONDS, ending_first

MASTER_PORT = 29_500

PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: one may tokenize or upload while the others wait."""

SHUTDOWN_SECONDS = int(GRACE_SECONDS) + 2
"""How long torchrun's processes have to end after a signal: longer than each allows itself."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = _CPU

    @property
    def main(self) -> bool:
        """Whether this process writes checkpoints, logs and scalars."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Tensor) -> Tensor:
        """Every process's tensor, stacked in the order of the processes."""
        if self.world_size == 1:
            return value.unsqueeze(0)
        every = [torch.empty_like(value) for _ in range(self.world_size)]
        dist.all_gather(every, value)
        return torch.stack(every)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any process; one exchange for all."""
        if self.world_size == 1:
            return list(flags)
        # On the CPU, through gloo: the exchange does not wait for the GPU's queue
        maxima = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in maxima.tolist()]

    def min(self, value: int) -> int:
        """The smallest of the processes' numbers."""
        if self.world_size == 1:
            return value
        smallest = torch.tensor(value)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    def broadcast(self, value: Any) -> Any:
        """The main process's object, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


@contextlib.contextmanager
def joined_processes(environ: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Join the process group of torchrun's environment; without one, this process is alone.

    Tensors on GPUs are exchanged through NCCL, those on the CPU through gloo.

    Raises:
        UsageError: torchrun's variables are incomplete.
        DeviceError: the machine has fewer GPUs than it was ordered with.
    """
    device = choose_device(environ)
    gpu = device.type == "cuda"
    if "LOCAL_RANK" not in environ:
        yield Processes(device=device)
        return
    try:
        rank, world_size, local = (
            int(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
    except (KeyError, ValueError) as error:
        raise UsageError(f"the environment of torchrun is incomplete: {error}") from None
    if gpu:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield Processes(rank, world_size, local, device)
    except TrainingError as error:
        ErrorHandler().record_exception(error)  # for the process that has started torchrun
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Nodes:
    """The machines of a job."""

    count: int = 1
    index: int = 0
    master: str = "127.0.0.1"
    port: int = MASTER_PORT


def find_nodes(environ: Mapping[str, str] = os.environ) -> Nodes:
    """The machines of a Vertex AI custom job from ``CLUSTER_SPEC``, else this one alone.

    See https://cloud.google.com/vertex-ai/docs/training/distributed-training: worker pool 0 holds
    the chief, the pools after it the workers.

    Raises:
        UsageError: ``CLUSTER_SPEC`` cannot be read.
    """
    text = environ.get("CLUSTER_SPEC")
    if not text:
        return Nodes()
    try:
        spec = json.loads(text)
        pools: dict[str, list[str]] = spec["cluster"]
        order = [(pool, i) for pool in sorted(pools) for i in range(len(pools[pool]))]
        index = order.index((spec["task"]["type"], int(spec["task"]["index"])))
        host, _, port = pools[order[0][0]][0].partition(":")
        return Nodes(len(order), index, host, int(port or MASTER_PORT))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"CLUSTER_SPEC cannot be understood ({error}): {text}") from None


def launch_if_needed(
    module: str,
    argv: list[str],
    environ: Mapping[str, str] = os.environ,
    *,
    secrets: Mapping[str, str] | None = None,
) -> bool:
    """Run the module through torchrun, if the job has several GPUs or several machines.

    Args:
        module: to run.
        argv: its flags.
        environ: tells the machines of the job.
        secrets: further environment of the processes.

    Returns:
        True when the processes of this machine, one per GPU, have succeeded; False where the
        caller is to run the module: for a single process, or started by torchrun itself.

    Raises:
        DeviceError: the machine has fewer GPUs than it was ordered with.
        TrainingError: the training cannot go on.
        LaunchError: the processes failed; they have logged why.
        Preempted: a signal stopped them.
    """
    if "LOCAL_RANK" in environ:
        return False
    nodes = find_nodes(environ)
    gpus = count_gpus(environ)
    if nodes.count * max(1, gpus) == 1:
        return False
    from torch.distributed.run import parse_args, run

    log.info("starting torchrun: %d machines with %d processes each", nodes.count, max(1, gpus))
    command = [*_torchrun_flags(nodes, max(1, gpus)), "-m", module, *argv]
    os.environ.update(secrets or {})
    try:
        # A second signal makes torchrun repeat it to its processes, which then end at once
        with ending_first(_nothing, _tell_children, seconds=SHUTDOWN_SECONDS + 2, after_second=3.0):
            run(parse_args(command))
    except ChildFailedError as error:
        raise _failure(error) from None
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        raise Preempted(f"stopped by {name}; start it again to go on", name) from None
    return True


def _torchrun_flags(nodes: Nodes, processes: int) -> list[str]:
    """How torchrun starts so many processes on each machine."""
    from torch.distributed.run import get_args_parser

    shutdown = f"--shutdown-timeout={SHUTDOWN_SECONDS}"
    known = "--shutdown-timeout" in get_args_parser().format_help()  # not in older releases
    rendezvous = [
        f"--nnodes={nodes.count}",
        f"--node-rank={nodes.index}",
        *("--master-addr", nodes.master),
        f"--master-port={nodes.port}",
    ]
    return [
        # --standalone takes a free port: another job may run on the same machine
        *(rendezvous if nodes.count > 1 else ["--standalone"]),
        f"--nproc-per-node={processes}",
        *([shutdown] if known else []),
    ]


def _failure(error: ChildFailedError) -> LiquidError:
    """What to raise where processes failed: what one has told, or its exit status."""
    for failure in error.failures.values():
        told = failure.message["message"] if isinstance(failure.message, dict) else ""
        kind, _, reason = str(told).partition(": ")
        if kind == TrainingError.__name__:
            return TrainingError(reason)
    rank, first = error.get_first_failure()
    words = f"process {rank} ended with status {first.exitcode}; its message is above"
    return LaunchError(words, first.exitcode)


def _nothing() -> None:
    """torchrun itself ends its processes."""


def _tell_children() -> None:
    """Pass the stop on where torchrun has not; they are in sessions of their own."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)


class LaunchError(LiquidError):
    """The processes of a run failed; carries their exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.exit_status = status if status > 0 else 128 - status
