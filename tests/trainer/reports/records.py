"""Runs' records as a training writes them, with losses that are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.metrics.lines import METRICS, encode

SPLIT = 40_000
"""Tokens of the validation split."""


def student_loss(tokens: float, context: int, *, floor: float = 3.0) -> float:
    """A loss that falls with the tokens trained on, and is lower at a longer context."""
    return floor + 4.0 * math.exp(-tokens / 4e5) + 8.0 / context


def write_run(
    output: Path,
    *,
    context: int = 64,
    contexts: Sequence[int] = (64, 128),
    steps: int = 240,
    every: int = 40,
    log_interval: int = 10,
    teacher: Mapping[int, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    floor: float = 3.0,
    ended: bool = True,
    skipped: int = 0,
    eval_tokens: int = 16_384,
    changed: Mapping[int, Mapping[str, Any]] | None = None,
    header: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``metrics.jsonl`` into a directory.

    Args:
        output: the directory, a run's output location.
        context: the training context.
        contexts: those evaluated at.
        steps: updates.
        every: updates between evaluations; 0 is none at all.
        log_interval: updates between log lines.
        teacher: its loss by context; none is a run without a teacher.
        settings: values that the command line gave.
        floor: what the losses fall to.
        ended: whether the run came to its end.
        skipped: updates skipped, from the middle on.
        eval_tokens: of the split that were evaluated on.
        changed: by step, fields of the lines of that step to replace.
        header: fields of the first line to replace.
    """
    teacher = {} if teacher is None else teacher
    first = _header(output, context, teacher, settings or {}) | dict(header or {})
    lines = [("header", first)]
    best, best_step = math.inf, -1

    def add(kind: str, step: int, fields: dict[str, Any]) -> None:
        new = (changed or {}).get(step, {})
        values = {name: new.get(name, value) for name, value in fields.items()}
        lines.append((kind, {"step": step, **values}))

    for step in range(1, steps + 1):
        tokens = step * 16 * context
        time = {"tokens": tokens, "seconds": step * 0.11}
        if step % log_interval == 0 or step == steps:
            loss = student_loss(tokens, context, floor=floor) + 0.1 * math.sin(step)
            alpha = 0.7 if step <= steps / 3 else 0.5 if step <= 2 * steps / 3 else 0.3
            values = {"loss": loss, "ce": loss + 0.1, "kd": loss - 2.5, "grad_norm": 0.8}
            values |= {"lr": 3e-3 * (1.05 - step / steps), "alpha": alpha, "T": 1.2}
            values |= {"tokens_per_second": 9300.0 + 50 * math.sin(step), "memory_gib": 0.62}
            values["skipped"] = skipped if step > steps / 2 else 0
            add("update", step, time | values)
        if every and (step % every == 0 or step == steps):
            losses = {
                f"val_loss_student@{length}": student_loss(tokens, length, floor=floor)
                for length in contexts
            }
            losses |= {f"val_loss_teacher@{length}": loss for length, loss in teacher.items()}
            counted = {
                "eval_tokens": {str(length): eval_tokens for length in contexts},
                "eval_tokens_of_split": {str(length): SPLIT for length in contexts},
            }
            add("evaluation", step, time | {"eval_seconds": 1.5} | counted | losses)
            value = lines[-1][1].get(f"val_loss_student@{context}")
            if value is not None and math.isfinite(value) and value < best:
                best, best_step = value, step
                for name in ("best.pt", f"ckpt_best_step{step}_vl{value:.4f}.pt"):
                    fields = {"name": name, "best": True, "metric": "val_loss_student"}
                    add("checkpoint", step, fields | {"value": value})
    if ended:
        end = {"seconds": steps * 0.11, "best_step": best_step}
        lines.append(("end", {"step": steps, **end, "best_value": best}))
    output.mkdir(parents=True, exist_ok=True)
    (output / METRICS).write_bytes(b"".join(encode(kind, fields) for kind, fields in lines))
    return output


def _header(
    output: Path, context: int, teacher: Mapping[int, float], settings: Mapping[str, Any]
) -> dict[str, Any]:
    given = {"block_size": context, "seed": 42, "hf_token_value": "hf_secretsecret"} | settings
    return {
        "format": 1,
        "run": str(output),
        "started": "2025-03-04T05:06:07+00:00",
        "settings": {
            **{name: {"value": v, "source": "command line"} for name, v in given.items()},
            "dropout": {"value": 0.0, "source": "default"},
        },
        "code": {"version": "0.1.0", "commit": None},
        "libraries": {"torch": "2.13.0", "python": "3.12.0"},
        "machine": {"host": "here", "cpus": 2, "gpu": None, "gpus": 0, "processes": 1},
        "student": {"parameters": 1_234_567, "d_model": 96},
        "teacher": {"name": "a-teacher", "parameters": 9_000_000, "targets": None}
        if teacher
        else {},
        "tokens": {"fingerprint": "abc"},
        "phase": {"step": 0, "checkpoint": None, "context": context, "stretched": False},
    }
