from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.samples import save_student
from trainer import entrypoint, export_hf
from trainer.checkpoints.model_card import model_card
from trainer.checkpoints.reading import read_checkpoint
from trainer.models.student import Student, StudentConfig
from trainer.runtime.commands import run_command
from trainer.runtime.errors import (
    CheckpointError,
    LiquidError,
    ModelError,
    StorageError,
    UsageError,
)
from trainer.runtime.log import set_up_logging
from trainer.storage.places import open_location


def test_an_exported_student_is_a_stock_gpt2(settings: dict[str, Any], tmp_path: Path) -> None:
    entrypoint.run(settings)
    checkpoint = tmp_path / "work" / "best.pt"
    target = tmp_path / "hf"
    assert export_hf.run(str(checkpoint), str(target)).positions == 32
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


def test_an_exported_rotary_student_is_a_stock_gpt_neox(teacher_dir: Path, tmp_path: Path) -> None:
    student = save_student(
        tmp_path / "s.pt",
        teacher=teacher_dir,
        pos_embedding="rotary",
        rope_scale=2.0,
        positions=0,
        n_heads=2,
    )
    export_hf.run(str(tmp_path / "s.pt"), str(tmp_path / "hf"), workdir=str(tmp_path / "w"))
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    assert model.config.max_position_embeddings == 32
    ids = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(1))
    expected = student.logits(ids)
    assert float((model(ids).logits.detach() - expected).abs().max()) <= 1e-5
    written = model.generate(ids[:1, :8], max_new_tokens=4, do_sample=False)
    assert int(written[0, 8]) == int(expected[0, 7].argmax())


def test_a_rotary_student_whose_context_nothing_tells(teacher_dir: Path, tmp_path: Path) -> None:
    shapes = {"pos_embedding": "rotary", "positions": 0, "n_heads": 2}
    save_student(tmp_path / "bare.pt", described=False, **shapes)
    save_student(tmp_path / "table.pt", teacher=teacher_dir)
    places = [str(tmp_path / "hf"), f"--tokenizer={teacher_dir}", f"--local_workdir={tmp_path}"]
    bare, table = ([str(tmp_path / name), *places] for name in ("bare.pt", "table.pt"))
    with pytest.raises(
        CheckpointError, match=r"bare\.pt does not tell the context .* --block_size"
    ):
        export_hf.main([*bare, "--n_heads=2"])
    with pytest.raises(UsageError, match=r"--block_size=16 is for rotary students; .*table\.pt"):
        export_hf.main([*table, "--block_size=16"])
    export_hf.main([*bare, "--n_heads=2", "--block_size=48"])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 48


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_exported_files_follow_the_umask(teacher_dir: Path, tmp_path: Path, umask: int) -> None:
    save_student(tmp_path / "s.pt", teacher=teacher_dir)
    before = os.umask(umask)
    try:
        export_hf.run(str(tmp_path / "s.pt"), str(tmp_path / "hf"), workdir=str(tmp_path / "w"))
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "hf").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md"} <= set(modes)
    assert set(modes.values()) == {0o666 & ~umask}
    assert (tmp_path / "hf").stat().st_mode & 0o777 == 0o777 & ~umask


def test_the_model_card_tells_what_the_run_was(settings: dict[str, Any], tmp_path: Path) -> None:
    schedules = {"alpha_schedule": "0:0.7,2:0.5", "T": 1.5, "eval_ctx_lens": (16, 32)}
    entrypoint.run(settings | schedules)
    checkpoint = tmp_path / "work" / "final.pt"
    for name, flags in (("unknown", []), ("given", ["--license=apache-2.0"])):
        export_hf.main([str(checkpoint), str(tmp_path / name), *flags])
    card = ModelCard.load(tmp_path / "given" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.datasets is None, "a directory is no data set of the hub"
    assert card.data.library_name == "transformers"
    metrics = read_checkpoint(checkpoint).meta["metrics"]
    student, teacher = metrics["val_loss_student@16"], metrics["val_loss_teacher@16"]
    assert f"| 16 | {student:.4f} | {math.exp(student):.2f} | {teacher:.4f} |" in card.text
    for line in (
        "| data set | corpus |",
        "| teacher | teacher |",
        "| alpha | 0:0.7,2:0.5 |",
        "| temperature | 1.5 |",
        "A small causal language model, distilled from teacher.",
        "On at most 1,000 tokens of the validation split, after step 6;",
        f"| tokens seen in this phase | {6 * 4 * 32} |",
        "AutoModelForCausalLM.from_pretrained(DIRECTORY)",
    ):
        assert line in card.text
    assert str(tmp_path) not in card.content
    assert ModelCard.load(tmp_path / "unknown" / "README.md").data.license == "unknown"


@pytest.mark.parametrize(
    ("alpha", "schedule", "taught"),
    [
        (0.5, "0:0.0", False),
        (0.0, "", False),
        (0.5, "3:0", True),
        (0.0, "0:0,3:0.2", True),
        (0.5, "", True),
    ],
)
def test_a_student_of_cross_entropy_alone_is_not_called_distilled(
    teacher_dir: Path, tmp_path: Path, alpha: float, schedule: str, taught: bool
) -> None:
    save_student(tmp_path / "s.pt", teacher=teacher_dir)
    student = read_checkpoint(tmp_path / "s.pt")
    given = {"alpha_schedule": schedule, "kd_alpha": alpha, "settings": {"alpha": alpha}}
    source = replace(student, meta=student.meta | given)
    card = model_card(
        source, student.student_config(None), architecture="GPT2", positions=32, parameters=1
    )
    assert ("distilled from teacher" in card) == taught
    assert ("knowledge-distillation" in card) == taught


def test_exports_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(LiquidError, match="is in use"):
        export_hf.run(str(tmp_path / "absent.pt"), str(tmp_path / "used"))
    bare = tmp_path / "bare.pt"
    student = Student(StudentConfig(64, 16, 1, 2, positions=8)).initialize(0)
    torch.save(student.state_dict(), bare)
    with pytest.raises(LiquidError, match="does not name its tokenizer; give --tokenizer"):
        export_hf.run(str(bare), str(tmp_path / "hf"), n_heads=2)
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"


def test_an_export_to_a_bucket(
    teacher_dir: Path, tmp_path: Path, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    student = save_student(tmp_path / "s.pt", teacher=teacher_dir)
    uri = f"{gcs_bucket}/hf"
    export_hf.run(str(tmp_path / "s.pt"), uri, workdir=str(tmp_path / "w"))
    assert not list(tmp_path.glob("gs*"))
    location = open_location(uri)
    entries = {entry.name: entry.generation for entry in location.list()}
    assert max(entries, key=lambda name: entries[name]) == "config.json", "it vouches for the rest"
    (tmp_path / "copy").mkdir()
    for name in entries:
        location.get(name, tmp_path / "copy" / name)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "copy"))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "copy"))
    ids = torch.tensor([tokenizer.encode("The if statement is used")])
    assert model.config.n_head == 5
    assert torch.allclose(model(ids).logits, student.logits(ids), atol=1e-4)
    with pytest.raises(UsageError, match=f"{uri} is in use; give a new directory"):
        export_hf.run("absent.pt", uri)
    assert {entry.name: entry.generation for entry in location.list()} == entries


def test_an_upload_cut_off_before_its_last_file_does_not_load(
    teacher_dir: Path, tmp_path: Path
) -> None:
    save_student(tmp_path / "s.pt", teacher=teacher_dir)
    export_hf.run(str(tmp_path / "s.pt"), str(tmp_path / "hf"), workdir=str(tmp_path))
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))


def test_a_tokenizer_that_is_too_large(teacher_dir: Path, tmp_path: Path) -> None:
    save_student(tmp_path / "s.pt", teacher=teacher_dir, vocab_size=500)
    with pytest.raises(ModelError, match=r"has 512 tokens, .*s\.pt a vocabulary of 500; give"):
        export_hf.run(str(tmp_path / "s.pt"), str(tmp_path / "hf"), workdir=str(tmp_path))
    assert not (tmp_path / "hf").exists()


def test_heads_and_positions_that_no_metadata_tells(teacher_dir: Path, tmp_path: Path) -> None:
    student = save_student(tmp_path / "bare.pt", described=False)
    places = [str(tmp_path / "bare.pt"), str(tmp_path / "hf"), f"--tokenizer={teacher_dir}"]
    places.append(f"--local_workdir={tmp_path / 'w'}")
    with pytest.raises(CheckpointError, match=r"bare\.pt: .* 12 heads do not divide; give --n_h"):
        export_hf.main(places)
    with pytest.raises(CheckpointError, match=r"bare\.pt does not tell how many of its 32 pos"):
        export_hf.main([*places, "--n_heads=5"])
    export_hf.main([*places, "--n_heads=5", "--trained_positions=24"])
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"))
    assert (model.config.n_head, model.config.n_positions) == (5, 24)
    ids = torch.arange(24)[None]
    assert torch.allclose(model(ids).logits, student.logits(ids), atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_heads=4"], "--n_heads=4: the checkpoint {} has 5; leave it out"),
        (["--n_heads=0"], "--n_heads=0 must be at least 1"),
        (["--n_heads=five"], "--n_heads='five': a whole number is needed"),
        (["--trained_positions=0"], "--trained_positions=0 must be at least 1"),
        (["--trained_positions=33"], "--trained_positions=33: the table of {} has 32 rows"),
        (["--tokeniser=x"], "unknown flag --tokeniser; did you mean --tokenizer?"),
        (["more"], "unexpected argument 'more' (see --help)"),
    ],
)
def test_usage_errors(
    teacher_dir: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_student(tmp_path / "s.pt", teacher=teacher_dir)
    places = [str(tmp_path / "s.pt"), str(tmp_path / "hf"), f"--local_workdir={tmp_path / 'w'}"]
    set_up_logging()
    assert run_command(export_hf.main, [*places, *flags]) == 2
    line = json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
    assert line.startswith(message.format(tmp_path / "s.pt"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("trained", [0, -1, 33])
def test_positions_that_no_command_line_has_checked(
    teacher_dir: Path, tmp_path: Path, trained: int
) -> None:
    save_student(tmp_path / "s.pt", teacher=teacher_dir)
    places = [str(tmp_path / name) for name in ("s.pt", "hf")]
    with pytest.raises(UsageError, match=f"--trained_positions={trained}: the table of .* 1 to 32"):
        export_hf.run(*places, trained_positions=trained, workdir=str(tmp_path))


def test_outputs_that_cannot_be_written_are_told_first(tmp_path: Path, gcs_bucket: str) -> None:
    (tmp_path / "file").write_text("mine")
    for output, kind, message in (
        ("", UsageError, "'' is neither gs://bucket/path nor a local path"),
        (str(tmp_path / "file"), UsageError, "is in use"),
        (str(tmp_path / "file" / "hf"), StorageError, "a file is in the way"),
        ("/proc/none/hf", StorageError, "writing to '/proc' failed"),
        (f"{gcs_bucket}-none/hf", StorageError, "does not exist"),
    ):
        with pytest.raises(kind, match=message):
            export_hf.run("absent.pt", output)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
