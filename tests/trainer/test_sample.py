"""Texts of students and teachers: what `generate` itself writes, and bad input in one line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.samples import save_student, save_teacher
from trainer import export_hf, sample
from trainer.models.student import Student
from trainer.runtime.commands import run_command
from trainer.runtime.log import set_up_logging
from trainer.settings.config import SAMPLE_SETTINGS, SETTINGS, TARGET_SETTINGS
from trainer.storage.places import open_location

PROMPT = "The if statement"
FEW = ["--max_new_tokens=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sample")


@pytest.fixture(scope="module")
def student(place: Path, teacher_dir: Path) -> Student:
    """Saved as ``s.pt`` and exported to ``hf``."""
    made = save_student(place / "s.pt", teacher=teacher_dir)
    export_hf.run(str(place / "s.pt"), str(place / "hf"), workdir=str(place / "w"))
    return made


def texts(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    sample.main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, list)
    return found


def argmax_text(student: Student, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The likeliest token each time, by the student's own forward pass."""
    ids = tokenizer.encode(prompt)
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(student.logits(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_no_setting_has_the_name_of_another_commands() -> None:
    assert not SAMPLE_SETTINGS.keys() & (SETTINGS.keys() | TARGET_SETTINGS.keys())


def test_greedy_texts_are_the_students_own_argmax(
    student: Student, place: Path, teacher_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [PROMPT, "A class"]
    flags = [*(f"--prompt={prompt}" for prompt in prompts), "--greedy", "--max_new_tokens=12"]
    flags.append(f"--local_workdir={place / 'w'}")
    tokenizer = AutoTokenizer.from_pretrained(str(teacher_dir))
    expected = [argmax_text(student, tokenizer, prompt, 12) for prompt in prompts]
    for source in ("s.pt", "hf"):
        found = texts(capsys, str(place / source), *flags)
        assert [entry["student"] for entry in found] == expected
        assert [entry["prompt"] for entry in found] == prompts
        assert [entry["teacher"] for entry in found] == [None, None]
    found = texts(capsys, str(place / "s.pt"), *flags, "--with_teacher")
    model = AutoModelForCausalLM.from_pretrained(str(teacher_dir)).eval()
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    written = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert (found[0]["student"], found[0]["teacher"]) == (expected[0], text)
    named = texts(capsys, str(place / "hf"), *flags, f"--teacher={teacher_dir}")
    assert named == found


def test_a_text_depends_on_its_prompt_and_the_seed_alone(
    student: Student, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = [str(place / "hf"), "--max_new_tokens=8", f"--local_workdir={place / 'w'}"]
    drawn = [*source, "--temperature=0.9", "--top_p=0.95", "--top_k=40", "--seed=3"]
    alone = texts(capsys, *drawn, f"--prompt={PROMPT}", "--num_return_sequences=3")
    assert len({entry["student"] for entry in alone}) > 1
    assert {entry["prompt"] for entry in alone} == {PROMPT}
    beside = texts(
        capsys, *drawn, "--prompt=A class", f"--prompt={PROMPT}", "--num_return_sequences=3"
    )
    assert beside[3:] == alone
    other = texts(capsys, *drawn[:-1], "--seed=4", f"--prompt={PROMPT}", "--num_return_sequences=3")
    assert other != alone
    likeliest = texts(capsys, *source, f"--prompt={PROMPT}", "--top_k=1")
    assert likeliest == texts(capsys, *source, f"--prompt={PROMPT}", "--greedy")


def test_a_rotary_student_prompts_of_a_file_and_of_the_standard_input(
    place: Path,
    teacher_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = save_student(
        place / "rotary.pt", teacher=teacher_dir, pos_embedding="rotary", positions=0, n_heads=2
    )
    flags = ["--greedy", "--max_new_tokens=6", f"--local_workdir={place / 'w'}"]
    (place / "prompts.txt").write_text(f"{PROMPT}\n\nA class\n", encoding="utf-8")
    found = texts(capsys, str(place / "rotary.pt"), *flags, f"--prompt_file={place}/prompts.txt")
    tokenizer = AutoTokenizer.from_pretrained(str(teacher_dir))
    expected = [argmax_text(student, tokenizer, prompt, 6) for prompt in (PROMPT, "A class")]
    assert [entry["student"] for entry in found] == expected
    typed = io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode()))
    monkeypatch.setattr(sys, "stdin", typed)
    sample.main([str(place / "rotary.pt"), *flags, "--prompt_file=-"])
    assert f"── prompt\n{PROMPT}\n── student\n{expected[0]}\n" in capsys.readouterr().out


def test_checkpoints_and_exports_in_a_bucket(
    student: Student, place: Path, gcs_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("s.pt", "s.pt.meta.json"):
        open_location(f"{gcs_bucket}/run").put(place / name, name)
    export_hf.run(str(place / "s.pt"), f"{gcs_bucket}/hf", workdir=str(place / "w"))
    flags = [f"--prompt={PROMPT}", "--max_new_tokens=8", f"--local_workdir={place / 'w'}"]
    here = texts(capsys, str(place / "s.pt"), *flags)
    assert texts(capsys, f"{gcs_bucket}/run/s.pt", *flags) == here
    assert texts(capsys, f"{gcs_bucket}/hf", *flags) == here


@pytest.mark.parametrize(
    ("source", "flags", "status", "message"),
    [
        ("s.pt", [], 2, "there is no prompt; give --prompt or --prompt_file"),
        ("s.pt", ["--prompt="], 2, "prompt '' is empty: it has no token"),
        ("s.pt", ["--prompt=a", "--max_new_tokens=32"], 2, "over the 32 positions of the student"),
        ("hf", ["--prompt=a", "--max_new_tokens=32"], 2, "over the 32 positions of the student"),
        (
            "s.pt",
            ["--prompt=a", "--max_new_tokens=20", "--teacher={}/short"],
            2,
            "over the 16 positions of the teacher",
        ),
        ("s.pt", ["--prompt=a", "--teacher_revision=v2"], 2, "is for a teacher; give --teacher or"),
        ("s.pt", ["--prompt=a", "--temperature=0"], 2, "--temperature=0 must be"),
        ("s.pt", ["--prompt=a", "--top_p=1.5"], 2, "--top_p=1.5 must be above 0 and at most 1"),
        (
            "s.pt",
            ["--prompt=a", "--greedy", "--top_k=5"],
            2,
            "--greedy draws nothing, so --top_k=5",
        ),
        ("s.pt", ["--promt=a"], 2, "unknown flag --promt; did you mean --prompt?"),
        ("hf", ["--prompt=a", "--n_heads=5"], 2, "--n_heads=5 is for checkpoints"),
        (
            "hf",
            ["--prompt=a", *FEW, "--with_teacher"],
            2,
            "does not name its teacher; give --teacher",
        ),
        ("s.pt", ["--prompt_file={}/absent"], 1, "absent"),
        ("s.pt", ["--prompt_file={}/blank"], 1, "has no prompt; write one a line"),
        ("s.pt", ["--prompt_file={}/s.pt"], 1, "is no UTF-8 text"),
        ("small.pt", ["--prompt=a"], 1, "has 512 tokens, "),
        ("s.pt", ["--prompt=a", *FEW, "--teacher={}/none"], 1, "no such directory"),
        ("w", ["--prompt=a"], 1, "is a directory without config.json; give a checkpoint in it"),
        ("nan", ["--prompt=a", *FEW], 1, "the student computes logits that are not finite"),
        ("absent.pt", ["--prompt=a"], 1, "absent.pt"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    student: Student,
    place: Path,
    teacher_dir: Path,
    tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    flags: list[str],
    status: int,
    message: str,
) -> None:
    if not (place / "small.pt").exists():
        save_student(place / "small.pt", teacher=teacher_dir, vocab_size=500)
        save_teacher(place / "short", tokenizer_dir, vocab=520, positions=16)
        broken = AutoModelForCausalLM.from_pretrained(str(place / "hf"))
        broken.transformer.ln_f.weight.data.fill_(torch.nan)
        shutil.copytree(place / "hf", place / "nan")
        broken.save_pretrained(str(place / "nan"))
        (place / "blank").write_text("\n \n")
    given = [flag.format(place) for flag in flags]
    set_up_logging()
    argv = [str(place / source), *given, f"--local_workdir={place / 'w'}"]
    assert run_command(sample.main, argv) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert message in json.loads(captured.err.splitlines()[-1])["message"]
