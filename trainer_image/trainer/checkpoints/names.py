"""Names of checkpoints, and which of them are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable

BEST, FINAL = "best.pt", "final.pt"

SIDECAR_SUFFIX = ".meta.json"

COMPILE_CACHE = "compile_cache.bin"
"""Beside a run's checkpoints: what the run has compiled."""

KEEP_BEST, KEEP_STEP, KEEP_TIME_SECONDS = 3, 5, 4 * 3600

TIME_EVERY_SECONDS = 30 * 60

_STEP_NAME = re.compile(r"ckpt_step_(\d+)\.pt")

_BEST_NAME = re.compile(r"ckpt_best_step(\d+)_vl[-+.\dnaif]+\.pt")

_TIME_NAME = re.compile(r"ckpt_time_(\d+)\.pt")


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


def outdated_at(names: Iterable[str], step: int) -> list[str]:
    """The checkpoints of a run at a step that retention would have given up already."""
    reached = []
    for name in names:
        match = _STEP_NAME.fullmatch(name) or _BEST_NAME.fullmatch(name)
        if match is None or int(match[1]) <= step:
            reached.append(name)
    return outdated(reached, reached)
