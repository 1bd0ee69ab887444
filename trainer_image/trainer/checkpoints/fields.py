"""What the fields of a checkpoint may be: type and range of each, and how much there is in all."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.runtime.errors import CheckpointError
from trainer.runtime.limits import TEXT_LIMIT

METADATA_LIMIT = 8 << 20
"""Characters of all texts, each counted once, and 8 for every value."""

_DEPTH, _ITEM = 16, 8

_LARGEST = 2**63 - 1

_MOST_PROCESSES = 1 << 16


@dataclass(frozen=True)
class Kind:
    """What values a field takes."""

    words: str
    fits: Callable[[Any], bool]


def whole(low: int, high: int = _LARGEST) -> Kind:
    """A whole number of a range, both ends included."""
    words = f"a whole number from {low}" + (f" to {high}" if high < _LARGEST else " on")
    return Kind(words, lambda value: type(value) is int and low <= value <= high)


def number(words: str, allowed: Callable[[float], bool]) -> Kind:
    """A number, whole or not, that ``allowed`` takes."""
    return Kind(words, lambda value: is_number(value) and allowed(float(value)))


TEXT = Kind("a text", lambda value: isinstance(value, str))

TABLE = Kind(
    "a table of named values",
    lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
)


def is_number(value: Any) -> bool:
    """Whether a value is a number that fits a float; whole numbers of JSON have no bound."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def are_metrics(value: Any) -> bool:
    """Whether a value is a dict of numbers; None stands for a number that is not finite."""
    return TABLE.fits(value) and all(entry is None or is_number(entry) for entry in value.values())


METRICS = Kind("numbers by name", are_metrics)


def check_fields(
    values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str, *, none: bool = False
) -> None:
    """Check those fields that are there.

    Args:
        values: the fields.
        kinds: what those that are known may be; others are left alone.
        where: stands before the field's name in the message.
        none: whether None stands for a field that is absent.

    Raises:
        CheckpointError: naming the first field that is of another type or range.
    """
    for name, kind in kinds.items():
        value = values.get(name)
        absent = value is None and (none or name not in values)
        if not absent and not kind.fits(value):
            raise CheckpointError(f"{where}{name} is {short(value)}, not {kind.words}")


_NESTED = {
    "pos_embedding": {
        "type": TEXT,
        "num_embeddings": whole(0),
        "embedding_dim": whole(1),
        "trained_positions": whole(0),
    },
    "dataset": dict.fromkeys(("name", "config", "revision", "fingerprint"), TEXT),
    "model": {"vocab_size": whole(1), "d_model": whole(1), "n_layers": whole(1)},
    "origin": {
        "checkpoint": TEXT,
        "digest": TEXT,
        "step": whole(0),
        "block_size": whole(1),
        "metrics": METRICS,
        "pos_resize": TEXT,
    },
    "settings": {},
    "code": dict.fromkeys(("version", "commit", "image"), TEXT),
    "pending_schedules": {"alpha": TEXT, "T": TEXT},
}


def check_meta(meta: Mapping[str, Any], step: int, source: str) -> None:
    """Check the fields of metadata that no setting's own check sees.

    Args:
        meta: plain metadata, or the content of a sidecar.
        step: updates done when the checkpoint was taken.
        source: what messages call the file.

    Raises:
        CheckpointError: naming the file, the field and its value.
    """
    if not are_metrics(meta.get("metrics") or {}):
        raise CheckpointError(f"{source} has metrics that are not numbers")
    names = ("save_best_on", "teacher_name", "teacher_targets", "tokenizer", "compiled")
    kinds = {"block_size": whole(1), "metrics_step": whole(-1, step)}
    where = f"{source}: its metadata's "
    kinds |= dict.fromkeys(names, TEXT) | dict.fromkeys(_NESTED, TABLE)
    check_fields(meta, kinds, where, none=True)
    for name, inner in _NESTED.items():
        check_fields(meta.get(name) or {}, inner, f"{where}{name}.", none=True)


def check_trainer_state(state: Mapping[Any, Any], step: int, source: str) -> None:
    """Check the state of a run beside weights and moments.

    Args:
        state: ``trainer_state``.
        step: updates done when the checkpoint was taken.
        source: what messages call the file.

    Raises:
        CheckpointError: naming the file, the field and its value.
    """
    done, count = whole(-1, step), whole(0, step)
    kinds = {
        "best_value": number("a loss or a perplexity", lambda value: value >= 0.0),
        "best_step": done,
        "skipped": count,
        "skipped_in_row": count,
        "metrics_step": done,
        "metrics": METRICS,
        "first_step": done,
        "loss_scale": TABLE,
        "window": TABLE,
    }
    check_fields(state, kinds, f"{source}: its trainer_state's ")
    window = state.get("window") or {}
    missing = [name for name in _LOG_WINDOW if window and window.get(name) is None]
    if missing:
        raise CheckpointError(f"{source}: its trainer_state's window lacks {missing[0]}")
    kinds = _LOG_WINDOW | {"updates": count}
    check_fields(window, kinds, f"{source}: its trainer_state's window.")
    scale = state.get("loss_scale") or {}
    missing = [name for name in _LOSS_SCALE if scale and scale.get(name) is None]
    if missing:
        raise CheckpointError(f"{source}: its trainer_state's loss_scale lacks {missing[0]}")
    check_fields(scale, _LOSS_SCALE, f"{source}: its trainer_state's loss_scale.")


def _are_window_sums(value: Any) -> bool:
    """Whether a value is two times four numbers for each of some processes."""

    def all_of(entry: Any, count: int, fits: Callable[[Any], bool]) -> bool:
        return isinstance(entry, list) and len(entry) == count and all(map(fits, entry))

    def finite(entry: Any) -> bool:
        return is_number(entry) and math.isfinite(entry)

    return (
        isinstance(value, list)
        and 1 <= len(value) <= _MOST_PROCESSES
        and all(all_of(own, 2, lambda row: all_of(row, 4, finite)) for own in value)
    )


_LOG_WINDOW = {
    "seconds": number("of seconds", lambda value: 0.0 <= value < 1e18),
    "updates": whole(0),
    "sums": Kind("sums and counts, two times four numbers a process", _are_window_sums),
}
"""Of the means since the last log line, see `trainer.training.log_window`."""

_LOSS_SCALE = {
    "scale": number("above 0 and at most 2^127", lambda value: 0.0 < value <= 2.0**127),
    "growth_factor": number("above 1 and at most 1024", lambda value: 1.0 < value <= 1024.0),
    "backoff_factor": number("above 0 and below 1", lambda value: 0.0 < value < 1.0),
    "growth_interval": whole(1, 2**31 - 1),
    "_growth_tracker": whole(0, 2**31 - 1),
}
"""Of torch.amp.GradScaler, which keeps the scale in fp32 and the tracker in 32 bits."""


def plain(meta: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Metadata as plain values, which go into messages and sidecars.

    Raises:
        CheckpointError: there is anything else among them, a text that is not Unicode, or more
            than a run's.
    """
    room, seen = METADATA_LIMIT, set[str]()
    torch = sys.modules.get("torch")  # of JSON, which needs no torch, come no tensors

    def copied(value: Any, depth: int) -> Any:
        nonlocal room
        if torch and isinstance(value, torch.Tensor) and value.device.type == "cpu":
            value = value.item() if value.numel() == 1 else value
        room -= _ITEM
        long = False
        if isinstance(value, str) and value not in seen:
            seen.add(value)
            room -= len(value)
            try:
                long = len(value.encode()) > TEXT_LIMIT
            except UnicodeEncodeError:
                raise CheckpointError(
                    f"{source}: its metadata has the text {short(value)}, which is not Unicode"
                ) from None
        if room < 0 or depth > _DEPTH or long:
            raise CheckpointError(f"{source} is refused: its metadata is larger than any run's")
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {copied(key, depth): copied(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [copied(entry, depth + 1) for entry in value]
        if value is None or isinstance(value, bool | str | float) or is_number(value):
            return value
        raise CheckpointError(f"{source}: its metadata has a {type(value).__name__} in it")

    return copied(dict(meta), 0)


def is_name(value: Any) -> bool:
    """Whether a key can be a parameter's name or an entry's, which messages show."""
    return isinstance(value, str) and value.isprintable() and len(value) <= 200


def short(value: Any) -> str:
    """For a message: what a value is, without printing much of it."""
    if isinstance(value, str):
        return repr(value[:40])
    if (
        value is None
        or isinstance(value, float)
        or (isinstance(value, int) and abs(value) < 1 << 63)
    ):
        return repr(value)
    if isinstance(value, int):
        return f"a number of {value.bit_length()} bits"
    return f"a {type(value).__name__}"
