"""A checkpoint's content: a snapshot as it is written, and what can be told of one that was read.

A checkpoint is a file that ``torch.load(weights_only=True)`` reads, holding ``model``,
``optimizer``, ``scheduler``, ``step``, ``trainer_state`` and ``meta``. Beside it lies a sidecar,
``{name}.meta.json``: the same metadata with the file's size and CRC32C, so that checkpoints can be
compared and trusted without reading any weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints.metadata import settings_from_meta
from trainer.checkpoints.names import sidecar_name
from trainer.checkpoints.sidecar import Sidecar
from trainer.checkpoints.tensor_checks import check_moments
from trainer.models.student import StudentConfig, expected_shapes
from trainer.runtime.errors import CheckpointError, UsageError
from trainer.runtime.messages import shortened
from trainer.settings.config import MAX_LAYERS, MAX_WIDTH, SETTINGS, check_values
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
        return dict(vars(self))

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
    digest: str | None = None
    """Of its file; None for one that was only looked into."""

    @cached_property
    def _shapes(self) -> StudentConfig:
        """Shapes by the weights alone, checked strictly, with 1 head: weights do not tell heads."""
        embed, table = self.weights.get("embed.weight"), self.weights.get("pos.weight")
        if embed is None or embed.ndim != 2 or not embed.numel():
            some = ", ".join(sorted(self.weights)[:3]) or "nothing"
            raise CheckpointError(
                f"{self.source}: no embed.weight [V, D] among the weights; found {some} …"
            )
        layers = {name.split(".")[1] for name in self.weights if name.startswith("blocks.")}
        if len(layers) > MAX_LAYERS:
            raise CheckpointError(
                f"{self.source} has {len(layers)} blocks; a student has {MAX_LAYERS} at most"
            )
        if embed.shape[1] > MAX_WIDTH:
            raise CheckpointError(
                f"{self.source} is {embed.shape[1]} wide; a student is {MAX_WIDTH} wide at most"
            )
        if not layers or layers != {str(index) for index in range(len(layers))}:
            raise CheckpointError(
                f"{self.source}: blocks are not numbered from 0 without a gap: {sorted(layers)[:8]}"
            )
        if table is not None and (
            table.ndim != 2 or table.shape[1] != embed.shape[1] or not len(table)
        ):
            raise CheckpointError(
                f"{self.source}: pos.weight has shape {list(table.shape)} in a student"
                f" {embed.shape[1]} wide"
            )
        rows, positions = (0, "rotary") if table is None else (table.shape[0], "absolute")
        vocabulary, width = embed.shape
        config = StudentConfig(vocabulary, width, len(layers), 1, rows, positions)
        expected = expected_shapes(config)
        actual = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        for name in [*expected, *actual]:
            if expected.get(name) != actual.get(name):
                raise CheckpointError(
                    f"{self.source}: {name} has shape {_shape(actual.get(name))}, but the student"
                    f" needs {_shape(expected.get(name))}"
                )
        return config

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that it gives to a new phase: those of its metadata and of its weights.

        Raises:
            CheckpointError: its metadata has values that no run can have, or the weights are not a
                student's.
        """
        names = ("d_model", "n_layers", "pos_embedding")
        values = {name: getattr(self._shapes, name) for name in names}
        try:
            values |= settings_from_meta(self.meta)
            check_values(values)
        except UsageError as error:
            raise CheckpointError(
                f"{self.source}: its metadata cannot work: {shortened(str(error))}"
            ) from None
        return values

    def student_config(self, n_heads: int | None = None) -> StudentConfig:
        """The student that the weights are of.

        What their shapes do not tell, the metadata does, else ``n_heads`` and the defaults.

        Raises:
            UsageError: ``n_heads`` is below 1, or the metadata names another number.
            CheckpointError: a parameter is missing, unknown or of another shape, the heads do not
                divide the width, or the metadata has values that no run can have.
        """
        check_values({"n_heads": n_heads})
        defaults = {name: SETTINGS[name].default for name in ("n_heads", "rope_scale", "dropout")}
        if n_heads is not None:
            defaults["n_heads"] = n_heads
        values = {name: self.settings.get(name, value) for name, value in defaults.items()}
        config = replace(self._shapes, **values)
        width, heads = config.d_model, config.n_heads
        if n_heads is not None and n_heads != heads:
            raise UsageError(
                f"--n_heads={n_heads}: the checkpoint {self.source} has {heads}; leave it out"
            )
        if width % heads:
            raise CheckpointError(
                f"{self.source}: the checkpoint is {width} wide, which {heads} heads do not divide;"
                " give --n_heads"
            )
        if config.pos_embedding == "rotary" and width // heads % 2:
            raise CheckpointError(
                f"{self.source}: rotary positions need an even head width, not {width}/{heads} ="
                f" {width // heads}; give --n_heads"
            )
        return config

    @property
    def context(self) -> int | None:
        """The context it was trained at, in tokens; None where its metadata does not tell."""
        context = self.meta.get("block_size")
        return context if type(context) is int and context > 0 else None

    def trained_positions(self, given: int | None = None, *, required: bool = False) -> int | None:
        """How many rows of the position table were trained.

        Metadata says it. Else AdamW's second moment does: a row that no batch ever used has had
        a gradient of exactly zero, so its moment is zero. Else the context trained at does.

        Args:
            given: ``--trained_positions``, which wins over what the checkpoint tells.
            required: whether to refuse a table whose trained rows nothing tells.

        Returns:
            The rows; None for a rotary student, and where nothing tells.

        Raises:
            UsageError: the table has no such number of rows.
            CheckpointError: nothing tells, and ``required`` is set.
        """
        table = self.weights.get("pos.weight")
        if table is None:
            if given is not None:
                raise UsageError(
                    f"--trained_positions={given}: {self.source} has rotary positions, no table;"
                    " leave it out"
                )
            return None
        rows = table.shape[0]
        if given is not None:
            if not 1 <= given <= rows:
                raise UsageError(
                    f"--trained_positions={given}: the table of {self.source} has {rows} rows;"
                    f" give 1 to {rows}"
                )
            return given
        described = self.meta.get("pos_embedding")
        trained = described.get("trained_positions") if isinstance(described, dict) else None
        if isinstance(trained, int) and 1 <= trained <= rows:
            return trained
        second = self.optimizer_by_name().get("pos.weight", {}).get("exp_avg_sq")
        if isinstance(second, Tensor) and second.shape == table.shape:
            used = second.abs().sum(dim=1).nonzero()
            if len(used):
                return int(used[-1]) + 1
        if self.context is not None and self.context <= rows:
            return self.context
        if required:
            raise CheckpointError(
                f"{self.source} does not tell how many of its {rows} position rows were trained;"
                " give --trained_positions"
            )
        return None

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
        of_these = all(
            type(index) is int and 0 <= index < len(names) and names[index] in self.weights
            for index in state
        )
        if not of_these or not all(isinstance(entry, dict) for entry in state.values()):
            raise CheckpointError(f"{self.source}: the optimizer's state is of other parameters")
        for index, entry in state.items():
            name = names[index]
            where = f"{self.source}: the optimizer's state of {name}"
            check_moments(entry, where, self.weights[name].numel())
        return {names[index]: entry for index, entry in state.items()}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none (it is absent)" if shape is None else str(list(shape))
