from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import entrypoint, export_hf
from trainer.checkpoint import read_checkpoint
from trainer.errors import LiquidError
from trainer.student import Student, StudentConfig


def test_an_exported_student_is_a_stock_gpt2(settings: dict[str, Any], tmp_path: Path) -> None:
    entrypoint.run(settings)
    checkpoint = tmp_path / "work" / "best.pt"
    target = export_hf.run(str(checkpoint), str(tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(str(target))
    tokenizer = AutoTokenizer.from_pretrained(str(target))
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.config.n_positions == tokenizer.model_max_length == 32
    saved = read_checkpoint(checkpoint)
    student = Student(saved.student_config(n_heads=4))
    student.load_state_dict(saved.weights)
    ids = torch.tensor([tokenizer.encode("The if statement is used for conditional execution.")])
    with torch.no_grad():
        ours, theirs = student.eval().logits(ids), model(ids).logits
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert float((ours - theirs).abs().max()) <= 1e-4
    assert int(generated[0, ids.shape[1]]) == int(ours[0, -1].argmax())


def test_exports_that_cannot_be_made(settings: dict[str, Any], tmp_path: Path) -> None:
    entrypoint.run(settings | {"pos_embedding": "rotary", "train_steps": 1})
    rotary = str(tmp_path / "work" / "final.pt")
    with pytest.raises(LiquidError, match="rotary student has no stock GPT-2 form"):
        export_hf.run(rotary, str(tmp_path / "hf"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(LiquidError, match="is in use"):
        export_hf.run(rotary, str(tmp_path / "used"))
    bare = tmp_path / "bare.pt"
    torch.save(Student(StudentConfig(64, 16, 1, 2, positions=8)).state_dict(), bare)
    with pytest.raises(LiquidError, match="does not name its tokenizer; give --tokenizer"):
        export_hf.run(str(bare), str(tmp_path / "hf"), n_heads=2)
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"
