"""What the record of a run begins with: everything that its numbers depend on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from trainer.checkpoints.snapshots import Snapshots
from trainer.data.streams import TokenStreams
from trainer.metrics.recording import Recorder, now
from trainer.models.teacher import Teacher
from trainer.runtime.log import without_secrets
from trainer.runtime.processes import Processes
from trainer.runtime.provenance import running_code
from trainer.runtime.strict_json import dumps
from trainer.settings.config import SETTINGS, TrainConfig, as_json, changed_settings
from trainer.settings.layers import CONFIG_FILE, DERIVED, Resolved
from trainer.targets.reading import Targets
from trainer.training.start import Start


def begin_record(
    resolved: Resolved,
    config: TrainConfig,
    start: Start,
    taught_by: Teacher | Targets | None,
    streams: TokenStreams,
    snapshots: Snapshots,
    processes: Processes,
) -> Recorder:
    """The recorder of a run, its header or the line of this start written.

    Args:
        resolved: the settings with their sources.
        config: the settings with what is derived on this machine.
        start: student, step and origin.
        taught_by: its teacher or targets.
        streams: the tokens.
        snapshots: at the output that the record lies at.
        processes: this process among those of the run, the main one.

    Raises:
        MetricsError: the record there is of a newer format.
        StorageError: it cannot be read, or this one not be written.
    """

    def of_another_run(header: Mapping[str, Any]) -> str:
        before = {
            name: entry["value"]
            for name, entry in header["settings"].items()
            if isinstance(entry, dict) and "value" in entry
        }
        ours = json.loads(without_secrets(dumps(config.run_settings())))
        return ", ".join(changed_settings(before, ours))

    header = {
        "run": config.uri,
        "started": now(),
        "settings": _settings(resolved, config),
        "code": running_code(),
        "libraries": {
            "torch": str(torch.__version__),
            "transformers": importlib.metadata.version("transformers"),
            "python": platform.python_version(),
        },
        "machine": _machine(processes),
        "student": {"parameters": _parameters(start.student), **start.student.config.as_dict()},
        "teacher": _teaching(config, taught_by),
        "tokens": asdict(streams.info),
        "phase": {
            "step": start.step,
            "checkpoint": start.origin.get("checkpoint"),
            "context": config.context,
            "stretched": start.stretched,
        },
    }
    recorder = Recorder(snapshots.location)
    recorder.begin(header, start.step, of_another_run, expected=bool(start.trainer_state))
    recorder.send(snapshots.keep)
    return recorder


def _settings(resolved: Resolved, config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Value and source of every setting; of secrets only that they were given."""
    described = {}
    for name, spec in SETTINGS.items():
        value, source = as_json(getattr(config, name)), resolved.sources[name]
        if getattr(config, name) != resolved.values[name]:
            source = DERIVED
        if spec.metadata["secret"] and value is not None:
            value = "***"
        source = "config file" if source == CONFIG_FILE else source
        described[name] = {"value": value, "source": source}
    return described


def _machine(processes: Processes) -> dict[str, Any]:
    gpu = processes.device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(processes.device) if gpu else None,
        "gpus": torch.cuda.device_count() if gpu else 0,
        "processes": processes.world_size,
    }


def _teaching(config: TrainConfig, taught_by: Teacher | Targets | None) -> dict[str, Any]:
    return {
        "name": config.teacher_name,
        "parameters": taught_by.parameters if isinstance(taught_by, Teacher) else None,
        "targets": taught_by.fingerprint if isinstance(taught_by, Targets) else None,
    }


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
