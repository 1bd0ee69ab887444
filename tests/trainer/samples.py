"""Teachers and checkpoints that tests are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.metadata import build_meta
from trainer.models.student import Student, StudentConfig
from trainer.settings.config import TrainConfig


def save_teacher(directory: Path, tokenizer_dir: Path, *, vocab: int, positions: int) -> Path:
    """A GPT-2 with random weights, large enough that its distribution is far from uniform."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=positions,
        n_embd=48,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(str(directory))
    AutoTokenizer.from_pretrained(str(tokenizer_dir)).save_pretrained(str(directory))
    return directory


def lively_gpt2(*, deviation: float, **settings: Any) -> Any:
    """A frozen GPT-2 whose biases and norms are not the trivial ones of a fresh model.

    Args:
        deviation: of the matrices.
        settings: of its configuration.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    common = {"n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**common | settings)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0.0, 0.3)
        elif ".ln_" in name:
            parameter.normal_(1.0, 0.2)
        else:
            parameter.normal_(0.0, deviation)
    return model


def base_package_payload(
    *, trained: int, rows: int, step: int = 68150, vocabulary: int = 64, width: int = 16
) -> dict[str, Any]:
    """A checkpoint as the base package writes it: one AdamW group, no metadata, a long table."""
    config = StudentConfig(
        vocab_size=vocabulary, d_model=width, n_layers=2, n_heads=4, positions=rows
    )
    student = Student(config).initialize(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for _ in range(2):
        ids = torch.randint(0, 64, (4, trained))
        student.logits(ids).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {
        "model": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "step": step,
    }


def save_student(
    path: Path,
    *,
    described: bool = True,
    teacher: Path | None = None,
    trained: int | None = None,
    **shapes: Any,
) -> Student:
    """Write a checkpoint of a student far from its trivial start; returns the student.

    Args:
        path: the file.
        described: with metadata; else a bare state dict.
        teacher: whose tokenizer the metadata names.
        trained: rows of the table that its metadata calls trained; default is all.
        shapes: of `StudentConfig`, where they are not these: 512 tokens, 40 wide, 2 blocks, 5
            heads, 32 positions.
    """
    common = {"vocab_size": 512, "d_model": 40, "n_layers": 2, "n_heads": 5, "positions": 32}
    config = StudentConfig(**common | shapes)
    student = Student(config).initialize(1).eval().requires_grad_(False)
    for parameter in student.parameters():
        parameter.mul_(5.0)
    if not described:
        torch.save(student.state_dict(), path)
        return student
    run = TrainConfig(
        teacher_name=None if teacher is None else str(teacher),
        block_size=32,
        d_model=config.d_model,
        n_heads=config.n_heads,
        pos_embedding=config.pos_embedding,
        rope_scale=config.rope_scale,
    )
    meta = build_meta(
        run, config, step=7, trained_positions=trained or 32, metrics={}, metrics_step=-1
    )
    Snapshot(student.state_dict(), None, {}, 7, {}, meta).write(path)
    return student
