"""The metadata of checkpoints. Nothing else knows its fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from trainer.checkpoints.fields import is_number
from trainer.models.pretrained import Pretrained
from trainer.runtime.errors import CheckpointError, UsageError
from trainer.runtime.messages import shortened
from trainer.runtime.provenance import running_code
from trainer.settings.config import SETTINGS, TrainConfig, check_values
from trainer.settings.schedules import learning_rate
from trainer.settings.values import parse_value

if TYPE_CHECKING:
    from trainer.models.student import StudentConfig

FORMAT_VERSION = 1

_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    0: lambda meta: meta | {"format_version": 1}
}
"""What brings metadata of a version to the next one; before version 1, none was named."""


class NewerFormatError(CheckpointError):
    """A checkpoint of a format that this program does not know yet; it is not damaged."""


def current_form(meta: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Metadata or a sidecar's content in the form of `FORMAT_VERSION`.

    Raises:
        NewerFormatError: it is of a later version.
        CheckpointError: its version is no version.
    """
    version = meta.get("format_version", 0)
    if type(version) is not int or not 0 <= version < 1 << 31:
        raise CheckpointError(f"{source} has a format_version that is not a whole number from 0 on")
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{source} is of checkpoint format {version}, and this program reads formats up to"
            f" {FORMAT_VERSION}; update the program"
        )
    current = dict(meta)
    for older in range(version, FORMAT_VERSION):
        current = _UPGRADES[older](current)
    return current


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
    targets: str | None = None,
) -> dict[str, Any]:
    """The metadata of a checkpoint taken after ``step`` updates.

    ``metrics`` are those of the last evaluation, which was after ``metrics_step`` updates.
    ``tokens`` is the fingerprint of the token streams that the run is trained on, and ``targets``
    that of the teacher's stored targets, None where the teacher itself is there.

    ``settings`` holds everything that defines the run, so that the same run can go on and another
    one is told apart; the fields beside it are the format's.
    """
    alpha, temperature = config.schedule_alpha, config.schedule_T
    last = max(step - 1, 0)
    return {
        **_state(
            student, step, config.block_size, trained_positions, metrics, metrics_step, origin
        ),
        "kd_alpha": alpha.at(last),
        "kd_temperature": temperature.at(last),
        "alpha_schedule": config.alpha_schedule,
        "temp_schedule": config.temp_schedule,
        "pending_schedules": {"alpha": alpha.pending(last), "T": temperature.pending(last)},
        **{name: getattr(config, name) for name in ("grad_accum", "micro_batch", "global_batch")},
        **{name: getattr(config, name) for name in ("warmup_steps", "train_steps")},
        "lr": learning_rate(
            last,
            peak=config.peak_lr,
            warmup_steps=config.warmup_steps,
            train_steps=config.train_steps,
        ),
        "lr_peak": config.peak_lr,
        "rope_scale": student.rope_scale,
        "eval_ctx_lens": list(config.contexts),
        "save_best_on": config.save_best_on,
        "tokenizer": config.teacher_name,
        "teacher_name": config.teacher_name,
        "teacher_targets": targets,
        "dataset": {
            "name": config.dataset_name,
            "config": config.dataset_config,
            "revision": config.dataset_revision,
            "fingerprint": tokens,
        },
        "seed": config.seed,
        "settings": config.run_settings(),
    }


class Source(Protocol):
    """What is told of a checkpoint that a phase began with; a `Checkpoint` has it."""

    source: str
    digest: str | None
    step: int
    meta: dict[str, Any]


def origin_of(source: Source, context: int | None, **more: Any) -> dict[str, Any]:
    """What a new phase's metadata says of the checkpoint that it came from.

    Args:
        source: the checkpoint.
        context: that it was trained at, in tokens; None where nothing tells.
        more: what was done to it.
    """
    return {
        "checkpoint": source.source,
        "digest": source.digest,
        "step": source.step,
        "block_size": context,
        "metrics": source.meta.get("metrics") or {},
        **more,
    }


def _state(
    student: StudentConfig,
    step: int,
    block_size: int | None,
    trained_positions: int,
    metrics: Mapping[str, float],
    metrics_step: int,
    origin: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the metadata of any student's weights says: what they are, and where they come from."""
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "block_size": block_size,
        "pos_embedding": {
            "type": student.pos_embedding,
            "num_embeddings": student.positions,
            "embedding_dim": student.d_model,
            "trained_positions": trained_positions,
        },
        "model": student.as_dict(),
        "metrics": dict(metrics),
        "metrics_step": metrics_step,
        "origin": dict(origin or {}),
        "code": running_code(),
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
    schedules = ("alpha_schedule", "temp_schedule", "pending_schedules")
    spent = (*schedules, "settings", "train_steps", "compiled")
    kept = {key: value for key, value in meta.items() if key not in spent}
    return kept | _state(student, 0, block_size, trained_positions, {}, -1, origin)


_SETTING_OF_META = {
    **{"kd_alpha": "alpha", "kd_temperature": "T"},
    **{name: name for name in ("alpha_schedule", "temp_schedule", "grad_accum", "global_batch")},
    **{name: name for name in ("warmup_steps", "train_steps", "lr_peak", "rope_scale")},
    **{name: name for name in ("eval_ctx_lens", "seed")},
}


def settings_from_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint's metadata gives to a new phase.

    Raises:
        UsageError: a value is not of its setting's type.
    """
    values = {
        name: parse_value(name, meta[key])
        for key, name in _SETTING_OF_META.items()
        if meta.get(key) not in (None, "", [])
    }
    if "global_batch" in values:
        # Independent of the number of processes and the micro-batch, as grad_accum is not
        values.pop("grad_accum", None)
    model = meta.get("model")
    for name in ("n_heads", "dropout"):
        if isinstance(model, dict) and model.get(name) is not None:
            values[name] = parse_value(name, model[name])
    return values


def tokens_of(meta: Mapping[str, Any]) -> str | None:
    """The fingerprint of the token streams that a run was trained on; None in older snapshots."""
    dataset = meta.get("dataset")
    fingerprint = dataset.get("fingerprint") if isinstance(dataset, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None


def targets_of(meta: Mapping[str, Any]) -> str | None:
    """The fingerprint of the targets that a run was trained from; None without any."""
    fingerprint = meta.get("teacher_targets")
    return fingerprint if isinstance(fingerprint, str) else None


def origin_digest(meta: Mapping[str, Any]) -> str:
    """The digest of the checkpoint that a run or a resized checkpoint came from; else empty."""
    origin = meta.get("origin")
    digest = origin.get("digest") if isinstance(origin, dict) else None
    return digest if isinstance(digest, str) else ""


def teacher_of(meta: Mapping[str, Any], cache_dir: str) -> Pretrained | None:
    """The teacher of a run, at the revision that its settings gave; None where nothing names it.

    Args:
        meta: the metadata of a checkpoint of the run.
        cache_dir: where files of a ``gs://`` directory are kept on this machine.
    """
    return _pretrained(meta, "teacher_name", cache_dir)


def tokenizer_of(meta: Mapping[str, Any], cache_dir: str) -> Pretrained | None:
    """As `teacher_of`: the model whose tokenizer the run's tokens are of."""
    return _pretrained(meta, "tokenizer", cache_dir)


def _pretrained(meta: Mapping[str, Any], key: str, cache_dir: str) -> Pretrained | None:
    name, settings = meta.get(key), meta.get("settings")
    revision = settings.get("teacher_revision") if isinstance(settings, dict) else None
    if not name:
        return None
    return Pretrained(str(name), str(revision) if revision else None, cache_dir)


def compiled_of(meta: Mapping[str, Any]) -> str | None:
    """The SHA-256 of the compiled code beside a run's snapshot; None where there is none."""
    digest = meta.get("compiled")
    return digest if isinstance(digest, str) else None


def run_settings_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that define the run a checkpoint belongs to.

    Raises:
        CheckpointError: the metadata has none, so that it is not one of this program's runs, or
            they have values that no run can have.
    """
    settings = meta.get("settings")
    if not isinstance(settings, dict):
        raise CheckpointError("the checkpoint does not say which settings its run had")
    try:
        parsed = {
            name: parse_value(name, value)
            for name, value in settings.items()
            if name in SETTINGS and value is not None and value != []
        }
        check_values(parsed)
    except UsageError as error:
        raise CheckpointError(f"its settings cannot work: {shortened(str(error))}") from None
    return parsed


def summary(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a list of models shows of a checkpoint: flat, and in plain types."""
    positions = meta.get("pos_embedding") or {}
    keys = ("step", "block_size", "kd_alpha", "kd_temperature", "teacher_name", "teacher_targets")
    shown = {key: meta.get(key) for key in keys}
    shown |= {f"metric {name}": value for name, value in (meta.get("metrics") or {}).items()}
    shown["pos_embedding"] = positions.get("type")
    shown["trained_positions"] = positions.get("trained_positions")
    return {key: value for key, value in shown.items() if value is not None}


def metric_of(meta: Mapping[str, Any], key: str) -> float:
    """A metric from metadata, infinity where it is absent or not a number."""
    value: Any = (meta.get("metrics") or {}).get(key)
    if not is_number(value) or not math.isfinite(value):
        return math.inf
    return float(value)
