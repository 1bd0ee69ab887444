"""The checkpoint format: names, payload, metadata, sidecars, retention. Nothing else knows them.

A checkpoint is a file that ``torch.load(weights_only=True)`` reads, holding ``model``,
``optimizer``, ``scheduler``, ``step``, ``trainer_state`` and ``meta``. Beside it lies a sidecar,
``{name}.meta.json``: the same metadata with the file's size and CRC32C, so that checkpoints can be
compared and trusted without reading any weights.
"""

from __future__ import annotations

import errno
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trainer.config import SETTINGS, TrainConfig, parse_value
from trainer.errors import CheckpointError, StorageError, UsageError
from trainer.schedules import learning_rate
from trainer.storage import atomic_write, crc32c_of, os_errors
from trainer.strict_json import dumps
from trainer.student import StudentConfig, expected_shapes, student_config_from_weights

FORMAT_VERSION = 1
BEST, FINAL = "best.pt", "final.pt"
SIDECAR_SUFFIX = ".meta.json"
SIDECAR_LIMIT = 1 << 20
"""Bytes; a larger sidecar is not one of ours."""
KEEP_BEST, KEEP_STEP, KEEP_TIME_SECONDS = 3, 5, 4 * 3600
TIME_EVERY_SECONDS = 30 * 60

_STEP_NAME = re.compile(r"ckpt_step_(\d+)\.pt")
_BEST_NAME = re.compile(r"ckpt_best_step(\d+)_vl[-+.\dnaif]+\.pt")
_TIME_NAME = re.compile(r"ckpt_time_(\d+)\.pt")

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ── names and retention ───────────────────────────────────────────────────────────────────────


def step_name(step: int) -> str:
    """Name of the snapshot after ``step`` updates."""
    return f"ckpt_step_{step}.pt"


def best_name(step: int, loss: float) -> str:
    """Name of the snapshot that was the best when it was taken; the loss is in nats."""
    return f"ckpt_best_step{step}_vl{loss:.4f}.pt"


def is_best_of(name: str, step: int) -> bool:
    """Whether a name is that of the best checkpoint taken at a step."""
    match = _BEST_NAME.fullmatch(name)
    return match is not None and int(match[1]) == step


def time_name(unix: float) -> str:
    """Name of the snapshot taken at a time, in whole seconds since 1970."""
    return f"ckpt_time_{int(unix)}.pt"


def sidecar_name(name: str) -> str:
    """Name of a checkpoint's sidecar."""
    return name + SIDECAR_SUFFIX


def is_checkpoint_name(name: str) -> bool:
    """Whether a file of this name is one of the checkpoints a run writes."""
    patterns = (_STEP_NAME, _BEST_NAME, _TIME_NAME)
    return name in (BEST, FINAL) or any(pattern.fullmatch(name) for pattern in patterns)


def outdated(names: Iterable[str], written: Iterable[str]) -> list[str]:
    """The checkpoints that retention gives up, once new ones are written.

    Kept are the last 3 ``ckpt_best_*``, the last 5 ``ckpt_step_*``, and ``ckpt_time_*`` of the 4
    hours before the new one. What comes after the new one, by its step or by a clock that ran
    ahead, is neither counted nor given up: a new checkpoint never makes room for an older one.

    Args:
        names: all checkpoints of the run, the new ones among them.
        written: the new ones.
    """
    drop: list[str] = []
    for pattern in (_STEP_NAME, _BEST_NAME, _TIME_NAME):
        new = [int(match[1]) for match in map(pattern.fullmatch, written) if match]
        if not new:
            continue
        found = [(match[0], int(match[1])) for match in map(pattern.fullmatch, names) if match]
        entries = sorted((at, name) for name, at in found if at <= max(new))
        if pattern is _TIME_NAME:
            drop += [name for at, name in entries if at < max(new) - KEEP_TIME_SECONDS]
        else:
            last = KEEP_STEP if pattern is _STEP_NAME else KEEP_BEST
            drop += [name for _, name in entries[:-last]]
    return drop


# ── metadata ──────────────────────────────────────────────────────────────────────────────────


def build_meta(
    config: TrainConfig,
    student: StudentConfig,
    *,
    step: int,
    trained_positions: int,
    metrics: Mapping[str, float],
    metrics_step: int,
    origin: Mapping[str, Any] | None = None,
    tokens: str | None = None,
) -> dict[str, Any]:
    """The metadata of a checkpoint taken after ``step`` updates.

    ``metrics`` are those of the last evaluation, which was after ``metrics_step`` updates.
    ``tokens`` is the fingerprint of the token streams that the run is trained on.

    ``settings`` holds everything that defines the run, so that the same run can go on and another
    one is told apart; the fields beside it are the format's.
    """
    alpha, temperature = config.schedule_alpha, config.schedule_T
    last = max(step - 1, 0)
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "block_size": config.block_size,
        "kd_alpha": alpha.at(last),
        "kd_temperature": temperature.at(last),
        "alpha_schedule": config.alpha_schedule,
        "temp_schedule": config.temp_schedule,
        "pending_schedules": {"alpha": alpha.pending(last), "T": temperature.pending(last)},
        "grad_accum": config.grad_accum,
        "micro_batch": config.micro_batch,
        "global_batch": config.global_batch,
        "warmup_steps": config.warmup_steps,
        "train_steps": config.train_steps,
        "lr": learning_rate(
            last,
            peak=config.peak_lr,
            warmup_steps=config.warmup_steps,
            train_steps=config.train_steps,
        ),
        "lr_peak": config.peak_lr,
        "pos_embedding": _position_meta(student, trained_positions),
        "rope_scale": student.rope_scale,
        "eval_ctx_lens": list(config.contexts),
        "metrics": dict(metrics),
        "metrics_step": metrics_step,
        "save_best_on": config.save_best_on,
        "model": student.as_dict(),
        "tokenizer": config.teacher_name,
        "teacher_name": config.teacher_name,
        "dataset": {
            "name": config.dataset_name,
            "config": config.dataset_config,
            "revision": config.dataset_revision,
            "fingerprint": tokens,
        },
        "seed": config.seed,
        "settings": config.run_settings(),
        "origin": dict(origin or {}),
    }


def _position_meta(student: StudentConfig, trained_positions: int) -> dict[str, Any]:
    return {
        "type": student.pos_embedding,
        "num_embeddings": student.positions,
        "embedding_dim": student.d_model,
        "trained_positions": trained_positions,
    }


def reset_meta(
    meta: Mapping[str, Any],
    student: StudentConfig,
    *,
    block_size: int,
    trained_positions: int,
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """The metadata of weights made ready for a new phase, from that of where they came from.

    Steps count from 0 again, so the schedules and settings of the phase behind are left out; what
    alpha, T and the learning rate had reached stays.
    """
    spent = ("alpha_schedule", "temp_schedule", "pending_schedules", "settings", "train_steps")
    kept = {key: value for key, value in meta.items() if key not in spent}
    return kept | {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "block_size": block_size,
        "pos_embedding": _position_meta(student, trained_positions),
        "model": student.as_dict(),
        "metrics": {},
        "metrics_step": -1,
        "origin": dict(origin),
    }


_SETTING_OF_META = {
    "kd_alpha": "alpha",
    "kd_temperature": "T",
    "alpha_schedule": "alpha_schedule",
    "temp_schedule": "temp_schedule",
    "grad_accum": "grad_accum",
    "global_batch": "global_batch",
    "warmup_steps": "warmup_steps",
    "train_steps": "train_steps",
    "lr_peak": "lr_peak",
    "rope_scale": "rope_scale",
    "eval_ctx_lens": "eval_ctx_lens",
    "seed": "seed",
}


def settings_from_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint's metadata gives to a new phase.

    Raises:
        CheckpointError: a value is not one that the setting can take.
    """
    values: dict[str, Any] = {}
    for key, name in _SETTING_OF_META.items():
        if meta.get(key) in (None, "", []):
            continue
        values[name] = _setting(name, key, meta[key])
    if "global_batch" in values:
        # Says the same whatever the number of processes or the micro-batch
        values.pop("grad_accum", None)
    model = meta.get("model")
    for key in ("n_heads", "dropout"):
        if isinstance(model, dict) and model.get(key) is not None:
            values[key] = _setting(key, f"model.{key}", model[key])
    return values


def _setting(name: str, key: str, value: Any) -> Any:
    try:
        return parse_value(name, value)
    except UsageError as error:
        raise CheckpointError(f"checkpoint metadata {key!r}: {error}") from None


def heads_of(meta: Mapping[str, Any]) -> int | None:
    """The attention heads that a checkpoint's metadata tells; weights alone do not."""
    model = meta.get("model")
    heads = model.get("n_heads") if isinstance(model, dict) else None
    return heads if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 else None


def tokens_of(meta: Mapping[str, Any]) -> str | None:
    """The fingerprint of the token streams that a run was trained on; None in older snapshots."""
    dataset = meta.get("dataset")
    found = dataset.get("fingerprint") if isinstance(dataset, dict) else None
    return found if isinstance(found, str) else None


def run_settings_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that define the run a checkpoint belongs to.

    Raises:
        CheckpointError: the metadata has none, so that it is not one of this program's runs.
    """
    settings = meta.get("settings")
    if not isinstance(settings, dict):
        raise CheckpointError("the checkpoint does not say which settings its run had")
    return {
        name: parse_value(name, value)
        for name, value in settings.items()
        if name in SETTINGS and value is not None and value != []
    }


# ── sidecars ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sidecar:
    """A checkpoint's metadata with the size and checksum of its file."""

    name: str
    size: int
    crc32c: str
    """Base64 of the big-endian CRC32C, as Cloud Storage gives it."""
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done when the checkpoint was taken."""
        return int(self.meta["step"])

    @property
    def metrics(self) -> dict[str, float]:
        """The last evaluation before it."""
        return self.meta["metrics"]

    def dump(self) -> bytes:
        """The JSON text."""
        content = {**self.meta, "file": self.name, "size": self.size, "crc32c": self.crc32c}
        return dumps(content, indent=2).encode()

    @classmethod
    def parse(cls, data: bytes, name: str) -> Sidecar:
        """Read a sidecar.

        Raises:
            CheckpointError: it is not JSON, or a field is missing or of the wrong type.
        """
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise CheckpointError(f"sidecar of {name} is not JSON; delete it or the pair") from None
        kinds = {"size": int, "crc32c": str, "step": int, "metrics": dict}
        for key, kind in kinds.items():
            value = content.get(key) if isinstance(content, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise CheckpointError(f"sidecar of {name} has no valid {key!r}: {value!r}")
        metrics = content["metrics"]
        if not _are_metrics(metrics):
            raise CheckpointError(f"sidecar of {name} has metrics that are not numbers")
        # JSON has no word for what is not finite
        content["metrics"] = {k: math.nan if v is None else v for k, v in metrics.items()}
        if content["step"] < 0 or content["size"] < 0:
            raise CheckpointError(f"sidecar of {name} has a negative step or size")
        meta = {k: v for k, v in content.items() if k not in ("file", "size", "crc32c")}
        return cls(name, content["size"], content["crc32c"], meta)


def verify_file(path: Path, sidecar: Sidecar) -> None:
    """Check a checkpoint file against its sidecar.

    Raises:
        CheckpointError: size or checksum differ.
    """
    size = path.stat().st_size
    if size != sidecar.size:
        raise CheckpointError(
            f"{sidecar.name} has {size} bytes, but its sidecar says {sidecar.size}: it was"
            " cut short or belongs to another sidecar"
        )
    found = crc32c_of(path)
    if found != sidecar.crc32c:
        raise CheckpointError(
            f"{sidecar.name} has checksum {found}, but its sidecar says {sidecar.crc32c}"
        )


# ── payload ───────────────────────────────────────────────────────────────────────────────────


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

    def write(self, path: Path, name: str | None = None) -> Sidecar:
        """Write the file, then its sidecar, each atomically; returns the sidecar.

        Raises:
            StorageError: the disk is full, or the directory cannot be written.
        """
        with atomic_write(path) as file:
            torch.save(self.payload(), file)
        sidecar = Sidecar(name or path.name, path.stat().st_size, crc32c_of(path), self.meta)
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
            _check_moments(entry, f"{self.source}: the optimizer's state of {names[index]}")
        return {names[index]: entry for index, entry in state.items()}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none (it is absent)" if shape is None else str(list(shape))


def read_checkpoint(path: Path, source: str | None = None) -> Checkpoint:
    """Read a checkpoint file without running any code it may carry.

    Raises:
        CheckpointError: it is truncated, not a checkpoint, carries code, claims more memory than
            it has bytes, or holds weights that are not finite.
        StorageError: this machine cannot read it, or has too little memory for it.
    """
    source = source or str(path)
    try:
        with os_errors("reading", source):
            _check_archive(path, source)
            return _interpret(_load(path, source), source, path.stat().st_size)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise StorageError(
            f"reading {source!r} failed: out of memory{_first_line(error, ' ({})')}; stop what else"
            " takes memory on this machine, or take one with more"
        ) from None


def _load(path: Path, source: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it refers to {detail[1]}" if detail else "it holds more than tensors and numbers"
        raise CheckpointError(f"{source} is refused: {what}, which could run code") from None
    except Exception as error:  # a damaged pickle can raise anything
        if _is_out_of_memory(error) or _is_machine_fault(error):
            raise
        first = _first_line(error) or type(error).__name__
        raise CheckpointError(f"{source} cannot be read as a checkpoint: {first}") from None


def _first_line(error: Exception, form: str = "{}") -> str:
    """The beginning of a message in a form; empty where there is none."""
    lines = str(error).strip().splitlines()
    return form.format(lines[0]) if lines else ""


def _is_out_of_memory(error: Exception) -> bool:
    # torch's allocator for the CPU has no type of error of its own
    signs = ("DefaultCPUAllocator", "can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def _is_machine_fault(error: Exception) -> bool:
    # An offset in a damaged archive may lie before its start, which is an invalid argument
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def _check_archive(path: Path, source: str) -> None:
    """Refuse archives that unpack to more than they hold before anything is unpacked."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        with open(path, "rb") as file:
            plain = _has_one_directory(file, size)
    except FileNotFoundError:
        raise CheckpointError(f"{source} does not exist") from None
    except Exception as error:  # a damaged directory can raise anything
        if _is_out_of_memory(error) or _is_machine_fault(error):
            raise
        raise CheckpointError(
            f"{source} is not a checkpoint of torch.save, or it was cut short: {error}"
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{source} is refused: it is a compressed archive, torch.save's are not"
        )
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size:
        raise CheckpointError(
            f"{source} is refused: it claims {unpacked} bytes of content in {size} bytes of file"
        )
    if not plain:
        raise CheckpointError(
            f"{source} is refused: its directory is not where its end says, torch.save's is"
        )


def _has_one_directory(file: BinaryIO, size: int) -> bool:
    """Whether the archive's directory lies right before its end records and is the one they name.

    Python searches it there and torch where they say, so two could be hidden in one file.
    Layout: APPNOTE.TXT 4.3.14 to 4.3.16, with no comment.
    """

    def number(data: bytes, at: int, length: int) -> int:
        return int.from_bytes(data[at : at + length], "little")

    end = size - 22
    file.seek(max(0, end - 20))
    tail = file.read()
    locator, record = tail[:-22], tail[-22:]
    if record[:4] != b"PK\x05\x06":
        return False
    length, start = number(record, 12, 4), number(record, 16, 4)
    if locator[:4] == b"PK\x06\x07":
        end -= 20 + 56
        file.seek(end)
        large = file.read(56)
        if number(locator, 8, 8) != end or large[:4] != b"PK\x06\x06":
            return False
        length, start = number(large, 40, 8), number(large, 48, 8)
    return start + length == end


def _interpret(payload: Any, source: str, size: int) -> Checkpoint:
    """Tell our layout, the base package's and a bare state dict apart, and check the types."""
    if not isinstance(payload, dict) or not payload:
        raise CheckpointError(f"{source} holds a {type(payload).__name__}, not a checkpoint's dict")
    bare = all(isinstance(value, Tensor) for value in payload.values())
    weights = payload if bare else payload.get("model")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise CheckpointError(f"{source} has no 'model' with named tensors")
    _check_weights(weights, source, size)
    if bare:
        return Checkpoint(source, dict(weights))
    step, meta, state = payload.get("step", 0), payload.get("meta"), payload.get("trainer_state")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{source} has step {_short(step)}, which is not a number of updates")
    optimizer = payload.get("optimizer")
    for name, value in (("meta", meta), ("trainer_state", state), ("optimizer", optimizer)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{source} has a {name} that is a {type(value).__name__}")
    meta = _plain(meta or {}, source)
    if meta.get("step", step) != step:
        raise CheckpointError(
            f"{source} contradicts itself: step {step}, in its metadata {meta['step']}"
        )
    return Checkpoint(source, dict(weights), optimizer, step, dict(state or {}), meta)


def _plain(meta: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Metadata as plain values, which go into messages and sidecars.

    Raises:
        CheckpointError: there is anything else among them, or more than a sidecar holds; or the
            metrics are not numbers.
    """
    room = SIDECAR_LIMIT // 4

    def copied(value: Any, depth: int) -> Any:
        nonlocal room
        if isinstance(value, Tensor) and _is_held(value) and value.numel() == 1:
            value = value.item()
        room -= len(value) + 8 if isinstance(value, str) else 8
        if room < 0 or depth > 16:
            raise CheckpointError(f"{source} is refused: its metadata is larger than any run's")
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {copied(key, depth): copied(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [copied(entry, depth + 1) for entry in value]
        if value is None or isinstance(value, bool | str | float) or _is_number(value):
            return value
        raise CheckpointError(f"{source}: its metadata has a {type(value).__name__} in it")

    found: dict[str, Any] = copied(dict(meta), 0)
    if not _are_metrics(found.get("metrics") or {}):
        raise CheckpointError(f"{source} has metrics that are not numbers")
    return found


def _short(value: Any) -> str:
    """For a message: what a value is, without printing much of it."""
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63):
        return repr(value)
    return f"a {type(value).__name__}"


def _is_held(tensor: Tensor) -> bool:
    # A tensor of the meta device is not moved by map_location
    return tensor.device.type == "cpu"


def _check_dense(tensor: Tensor, name: str) -> None:
    if tensor.is_nested or tensor.dtype not in _FLOATS or tensor.layout != torch.strided:
        raise CheckpointError(f"{name} is a {tensor.dtype} tensor, not a dense float one")
    if not _is_held(tensor):
        raise CheckpointError(f"{name} has a shape but no values")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} claims more elements than it holds")
    # A run's weights and moments are in fp32, whose range is less than fp64's
    if not bool(torch.isfinite(tensor.float()).all()):
        raise CheckpointError(f"{name} has values that are not finite")


def _check_weights(weights: Mapping[str, Tensor], source: str, size: int) -> None:
    for name, tensor in weights.items():
        _check_dense(tensor, f"{source}: {name}")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    # A head may share the embedding's memory, no more than that
    if claimed > 2 * size:
        raise CheckpointError(
            f"{source} is refused: its weights are {claimed} bytes in {size} bytes of file"
        )


def _check_moments(entry: Mapping[str, Any], name: str) -> None:
    """AdamW's state of one parameter: updates, and the first and second moment."""
    for key, value in entry.items():
        if isinstance(value, Tensor):
            _check_dense(value, f"{name}: {key}")
            lowest = float(value.min()) if value.numel() else 0.0
        elif _is_number(value):
            lowest = float(value)
        else:
            raise CheckpointError(f"{name}: {key} is a {type(value).__name__}, not a number")
        if key in ("step", "exp_avg_sq") and not 0 <= lowest < math.inf:
            raise CheckpointError(f"{name}: {key} is {lowest:g}, which cannot be")


def summary(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a list of models shows of a checkpoint: flat, and in plain types."""
    positions = meta.get("pos_embedding") or {}
    shown = {
        key: meta.get(key)
        for key in ("step", "block_size", "kd_alpha", "kd_temperature", "teacher_name")
    }
    shown |= {f"metric {name}": value for name, value in (meta.get("metrics") or {}).items()}
    shown["pos_embedding"] = positions.get("type")
    shown["trained_positions"] = positions.get("trained_positions")
    return {key: value for key, value in shown.items() if value is not None}


def metric_of(meta: Mapping[str, Any], key: str) -> float:
    """A metric from metadata, infinity where it is absent or not a number."""
    value: Any = (meta.get("metrics") or {}).get(key)
    if not _is_number(value) or isinstance(value, bool) or not math.isfinite(value):
        return math.inf
    return float(value)


def _are_metrics(value: Any) -> bool:
    """Whether it is numbers by name; None stands for one that is not finite."""
    return isinstance(value, dict) and all(
        entry is None or _is_number(entry) for entry in value.values()
    )


def _is_number(value: Any) -> bool:
    """Whether it is one that a float can hold; JSON's whole numbers have no bound."""
    if not isinstance(value, int | float):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True
