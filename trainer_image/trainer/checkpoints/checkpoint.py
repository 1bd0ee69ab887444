"""The checkpoint format: names, payload, metadata, sidecars, retention. Nothing else knows them.

A checkpoint is a file that ``torch.load(weights_only=True)`` reads, holding ``model``,
``optimizer``, ``scheduler``, ``step``, ``trainer_state`` and ``meta``. Beside it lies a sidecar,
``{name}.meta.json``: the same metadata with the file's size and CRC32C, so that checkpoints can be
compared and trusted without reading any weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints.metadata import settings_from_meta
from trainer.checkpoints.names import sidecar_name
from trainer.checkpoints.sidecar import Sidecar
from trainer.checkpoints.tensor_checks import check_moments
from trainer.models.student import StudentConfig, expected_shapes, student_config_from_weights
from trainer.runtime.errors import CheckpointError, UsageError
from trainer.settings.config import TrainConfig
from trainer.storage.files import Checksummed, atomic_write


@dataclass
class Snapshot:
    """A checkpoint's payload, in memory on the CPU, and independent of later updates."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    scheduler: dict[str, Any]
    step: int
    trainer_state: dict[str, Any]
    meta: dict[str, Any]

    def payload(self) -> dict[str, Any]:
        """What `torch.save` writes."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "step": self.step,
            "trainer_state": self.trainer_state,
            "meta": self.meta,
        }

    def write_file(self, path: Path) -> tuple[int, str]:
        """Write the file alone, atomically; returns its bytes and its CRC32C.

        Raises:
            StorageError: the disk is full, or the directory cannot be written.
        """
        with atomic_write(path) as file:
            checksummed: Any = Checksummed(file)
            torch.save(self.payload(), checksummed)
        return path.stat().st_size, checksummed.crc32c

    def write(self, path: Path, name: str | None = None) -> Sidecar:
        """Write the file, then its sidecar, each atomically; returns the sidecar.

        Raises:
            StorageError: the disk is full, or the directory cannot be written.
        """
        sidecar = Sidecar(name or path.name, *self.write_file(path), self.meta)
        with atomic_write(path.with_name(sidecar_name(path.name))) as file:
            file.write(sidecar.dump())
        return sidecar


@dataclass
class Checkpoint:
    """A checkpoint as read: ours, one of the base package, or a bare state dict."""

    source: str
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None
    step: int = 0
    trainer_state: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def student_config(
        self, *, n_heads: int, rope_scale: float = 1.0, dropout: float = 0.0
    ) -> StudentConfig:
        """The student's shapes from the weights, checked strictly.

        Raises:
            CheckpointError: a parameter is missing, unknown or of another shape.
        """
        config = self._config_of_weights(n_heads, rope_scale, dropout)
        expected = expected_shapes(config)
        found = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        for name in [*expected, *found]:
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"{self.source}: {name} has shape {_shape(found.get(name))}, but the student"
                    f" needs {_shape(expected.get(name))}"
                )
        return config

    def _config_of_weights(self, n_heads: int, rope_scale: float, dropout: float) -> StudentConfig:
        try:
            return student_config_from_weights(
                self.weights, n_heads=n_heads, rope_scale=rope_scale, dropout=dropout
            )
        except CheckpointError as error:
            raise CheckpointError(f"{self.source}: {error}") from None

    def settings(self) -> dict[str, Any]:
        """The settings that it gives to a new phase: those of its metadata and of its weights.

        Raises:
            CheckpointError: its metadata has values that no run can have, or the weights are not a
                student's.
        """
        shapes = self._config_of_weights(1, 1.0, 0.0)
        values = {name: getattr(shapes, name) for name in ("d_model", "n_layers", "pos_embedding")}
        try:
            values |= settings_from_meta(self.meta)
            # With a name of a checkpoint shapes are left for it to tell, heads among them
            TrainConfig(**values, resume_gcs_uri=self.source)
        except UsageError as error:
            raise CheckpointError(f"{self.source}: its metadata cannot work: {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{self.source}: {error}") from None
        return values

    def trained_positions(self) -> int | None:
        """How many rows of the position table were trained; None where nothing tells.

        Metadata says it. Else AdamW's second moment does: a row that no batch ever used has had
        a gradient of exactly zero, so its moment is zero. Else the context trained at does.
        """
        table = self.weights.get("pos.weight")
        if table is None:
            return None
        described = self.meta.get("pos_embedding")
        said = described.get("trained_positions") if isinstance(described, dict) else None
        if isinstance(said, int) and 1 <= said <= table.shape[0]:
            return said
        moments = self.optimizer_by_name().get("pos.weight", {})
        second = moments.get("exp_avg_sq")
        if isinstance(second, Tensor) and second.shape == table.shape:
            used = second.abs().sum(dim=1).nonzero()
            if len(used):
                return int(used[-1]) + 1
        context = self.meta.get("block_size")
        return context if isinstance(context, int) and 1 <= context <= table.shape[0] else None

    def optimizer_by_name(self) -> dict[str, dict[str, Any]]:
        """AdamW's state by parameter name; empty where the checkpoint has none.

        The base package keeps one group over all parameters in module order; ours names them.

        Raises:
            CheckpointError: the state does not fit the parameters.
        """
        return dict(self._named_state)

    @cached_property
    def _named_state(self) -> dict[str, dict[str, Any]]:
        # Kept, since looking through all moments takes as long as reading them
        if not self.optimizer:
            return {}
        state, groups = self.optimizer.get("state"), self.optimizer.get("param_groups")
        if not isinstance(state, dict) or not isinstance(groups, list):
            raise CheckpointError(
                f"{self.source}: the optimizer state has no state and param_groups"
            )
        names = self.trainer_state.get("optimizer_names")
        names = list(self.weights) if names is None else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{self.source}: its optimizer_names are not a list of names")
        try:
            indices = [index for group in groups for index in group.get("params", [])]
        except (AttributeError, TypeError):
            indices = [None]
        if not all(type(index) is int for index in indices):
            raise CheckpointError(f"{self.source}: the optimizer's groups are damaged")
        if sorted(indices) != list(range(len(names))):
            raise CheckpointError(
                f"{self.source}: optimizer state over {len(indices)} parameters for a student of"
                f" {len(names)}"
            )
        of_these = all(type(index) is int and index < len(names) for index in state)
        if not of_these or not all(isinstance(entry, dict) for entry in state.values()):
            raise CheckpointError(f"{self.source}: the optimizer's state is of other parameters")
        for index, entry in state.items():
            check_moments(entry, f"{self.source}: the optimizer's state of {names[index]}")
        return {names[index]: entry for index, entry in state.items()}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none (it is absent)" if shape is None else str(list(shape))
