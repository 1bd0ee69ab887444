"""What the pipelines of the test take: a corpus, a teacher, and a checkpoint to start from."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from pipelines.embedded import build_tokenizer
from tests.trainer.samples import save_student, save_teacher

DOCUMENTS, VALIDATION = 20, 3
VOCABULARY = 512
CONTEXT, LONGER = 32, 64
"""Of the two trainings."""


def make_inputs(directory: Path) -> None:
    """Write ``corpus``, ``teacher`` and ``start.pt``, in modes that every user can read."""
    corpus = directory / "corpus"
    corpus.mkdir(parents=True)
    texts = [text for _, text in sorted(topics.items())]
    parts = {"train": texts[VALIDATION:DOCUMENTS], "validation": texts[:VALIDATION]}
    for name, part in parts.items():
        lines = (json.dumps({"text": text}) for text in part)
        (corpus / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = build_tokenizer(corpus, directory / "tokenizer", vocab_size=VOCABULARY)
    teacher = save_teacher(directory / "teacher", tokenizer, vocab=VOCABULARY + 8, positions=LONGER)
    save_student(
        directory / "start.pt",
        teacher=teacher,
        vocab_size=VOCABULARY,
        d_model=32,
        n_heads=4,
        positions=CONTEXT,
    )
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def parameters_at(place: str) -> dict[str, Any]:
    """The pipeline's parameters.

    Args:
        place: of the inputs, a directory or ``gs://``.
    """
    small = {"eval_max_tokens": 600}
    return {
        "teacher_name": f"{place}/teacher",
        "dataset_name": f"{place}/corpus",
        "resume_gcs_uri": f"{place}/start.pt",
        "dataset_config": "",
        "teacher": "cached",
        "target_workers": 2,
        "eval_ctx_lens": f"{CONTEXT},{LONGER}",
        "anneal_block_size": CONTEXT,
        "anneal_train_steps": 400,
        "anneal_warmup_steps": 20,
        "anneal_lr_peak": 1e-3,
        "anneal_alpha_schedule": "0:0.7,100:0.5,200:0.3",
        "anneal_temp_schedule": "0:1.2,200:1.0",
        "anneal_grad_accum": 1,
        "anneal_micro_batch": 4,
        "anneal_eval_every": 100,
        "anneal_save_every": 100,
        "anneal_log_interval": 5,
        "anneal_more_settings": small,
        "continue_block_size": LONGER,
        "continue_train_steps": 40,
        "continue_warmup_steps": 5,
        "continue_lr_peak": 1e-3,
        "continue_alpha_schedule": "0:0.5,20:0.4",
        "continue_grad_accum": 2,
        "continue_micro_batch": 2,
        "continue_eval_every": 20,
        "continue_save_every": 20,
        "continue_log_interval": 10,
        "continue_more_settings": small,
        "evaluate_more_settings": small,
    }
