"""Both phases through the trainer's own command line, on the embedded corpus and teacher.

    python -m pipelines.phases [WORK_DIR]

Anneals a student at a short context, then continues its best checkpoint at twice the context with
a fresh optimizer. Everything lands under WORK_DIR; started again, finished parts are kept.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.embedded import build_corpus, build_teacher
from trainer import evaluate, pick_best
from trainer.config import resolve, run_command
from trainer.errors import LiquidError
from trainer.log import log, quiet_libraries, set_up_logging

SHORT, LONG = 64, 128
"""The two contexts, in tokens."""

STUDENT = {"d_model": 96, "n_layers": 3, "n_heads": 4}
COMMON = {
    "eval_ctx_lens": f"{SHORT},{LONG}",
    "eval_max_tokens": 16_384,
    "micro_batch": 8,
    "save_every": 100,
    "log_interval": 25,
}
ANNEAL = COMMON | {
    "block_size": SHORT,
    "train_steps": 240,
    "warmup_steps": 24,
    "grad_accum": 2,
    "lr_peak": 3e-3,
    "eval_every": 80,
    "alpha_schedule": "0:0.7,80:0.5,160:0.3",
    "temp_schedule": "0:1.2,160:1.0",
}
CONTINUE = COMMON | {
    "block_size": LONG,
    "train_steps": 120,
    "warmup_steps": 12,
    "grad_accum": 1,
    "lr_peak": 1.5e-3,
    "eval_every": 40,
    "alpha_schedule": "0:0.5,40:0.4,80:0.3",
    "reset_optim_on_ctx_change": True,
}


def train(title: str, settings: dict[str, Any]) -> None:
    """Run the trainer's command line in a process of its own, its output passed through.

    Raises:
        LiquidError: it failed.
    """
    argv = [f"--{name}={value}" for name, value in settings.items()]
    log.info("%s: python -m trainer.entrypoint %s", title, " ".join(argv))
    done = subprocess.run([sys.executable, "-m", "trainer.entrypoint", *argv])
    if done.returncode:
        raise LiquidError(f"{title} ended with status {done.returncode}")


def run(work: Path) -> list[evaluate.EvaluationRow]:
    """Corpus, teacher, both phases, evaluation; returns the rows of the table."""
    corpus = build_corpus(work / "corpus")
    teacher = build_teacher(work / "teacher", corpus, workdir=work / "teacher-run")
    data = {
        "teacher_name": teacher,
        "dataset_name": corpus,
        "cache_dir": work / "cache",
    }
    anneal, longer = work / "anneal", work / "continue"
    train("anneal", data | STUDENT | ANNEAL | {"local_workdir": anneal})
    first = pick_best.run([str(anneal)], "val_loss_student")
    train("continue", data | CONTINUE | {"local_workdir": longer, "resume_gcs_uri": first.uri})
    second = pick_best.run([str(longer)], "val_loss_student")
    config = resolve(
        {name: str(value) for name, value in data.items()}
        | {"eval_ctx_lens": (SHORT, LONG), "local_workdir": str(work / "evaluate")},
        {},
    ).config
    return evaluate.run(config, [first.uri, second.uri], str(work / "evaluation"))


def table(rows: list[evaluate.EvaluationRow]) -> str:
    """Phase, context, student's and teacher's loss, aligned for a terminal."""
    lines = [f"{'phase':22} {'context':>7} {'student':>9} {'teacher':>9}   loss in nats per token"]
    for row in rows:
        phase = f"{Path(row.checkpoint).parent.name} (step {row.step})"
        theirs = "–" if row.teacher_loss is None else f"{row.teacher_loss:.4f}"
        lines.append(f"{phase:22} {row.context:>7} {row.student_loss:>9.4f} {theirs:>9}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line."""
    set_up_logging()
    quiet_libraries()
    work = Path(argv[0] if argv else "work/phases")
    started = time.monotonic()
    rows = run(work)
    print(f"\n{table(rows)}\n")
    for row in rows[:: len(rows) // 2]:
        print(f"checkpoint  {row.checkpoint}")
    print(f"table       {work / 'evaluation' / 'metrics.md'}")
    print(f"took        {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
