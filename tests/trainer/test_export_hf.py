from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.samples import save_student
from trainer import entrypoint, export_hf
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
    target = export_hf.run(str(tmp_path / "s.pt"), uri, workdir=str(tmp_path / "w"))
    assert target == uri
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
    whole = export_hf.run(str(tmp_path / "s.pt"), str(tmp_path / "hf"), workdir=str(tmp_path))
    (Path(whole) / "config.json").unlink()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(whole)


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
