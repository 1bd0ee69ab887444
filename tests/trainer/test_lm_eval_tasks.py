"""A task of lm-eval on an exported student, against the student's own likelihoods."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.trainer.samples import save_student
from trainer import export_hf, lm_eval_tasks
from trainer.models.student import Student
from trainer.runtime.commands import run_command
from trainer.runtime.log import set_up_logging
from trainer.settings.config import LM_EVAL_SETTINGS, SAMPLE_SETTINGS, SETTINGS, TARGET_SETTINGS

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(
    not INSTALLED, reason="lm-eval is not installed: pip install -e '.[lm-eval]'"
)
WORDS = "if for while with try del pass break def class".split()
CHOICES = ["execution", "banana", "purple"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path) -> Path:
    """A student, ``s.pt`` exported to ``hf``, and ``mine.yaml``, a task over ``data.jsonl``."""
    directory = tmp_path_factory.mktemp("lm-eval")
    save_student(directory / "s.pt", teacher=teacher_dir)
    export_hf.run(str(directory / "s.pt"), str(directory / "hf"), workdir=str(directory / "w"))
    rows = [
        {"question": f"The {word} statement is used for", "choices": CHOICES, "answer": i % 3}
        for i, word in enumerate(WORDS)
    ]
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "python_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "mine.yaml").write_text(json.dumps(task))
    (directory / "absent.yaml").write_text(json.dumps(task).replace("data.jsonl", "none.jsonl"))
    return directory


def own_accuracy(student: Student, tokenizer: Any) -> float:
    """How often the likeliest of the choices is the right one."""
    right = 0
    for i, word in enumerate(WORDS):
        start = len(tokenizer.encode(f"The {word} statement is used for"))
        sums = []
        for choice in CHOICES:
            ids = torch.tensor([tokenizer.encode(f"The {word} statement is used for {choice}")])
            steps = student.logits(ids)[0].log_softmax(-1)[start - 1 : -1]
            sums.append(float(steps.gather(1, ids[0, start:, None]).sum()))
        right += sums.index(max(sums)) == i % 3
    return right / len(WORDS)


@needs_lm_eval
def test_a_task_gives_what_the_students_own_likelihoods_give(
    place: Path, teacher_dir: Path, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    flags = [f"--tasks={place / 'mine.yaml'}", f"--local_workdir={place / 'w'}"]
    lm_eval_tasks.main([str(place / "hf"), str(place / "out"), *flags])
    found = json.loads((place / "out" / "lm_eval.json").read_text())
    student = save_student(place / "again.pt", teacher=teacher_dir)
    expected = own_accuracy(student, AutoTokenizer.from_pretrained(str(teacher_dir)))
    assert found["results"]["python_words"]["acc,none"] == pytest.approx(expected)
    assert found["samples"]["python_words"]["effective"] == len(WORDS)
    assert "|python_words|" in (place / "out" / "lm_eval.md").read_text()
    # One in a bucket is the same student
    export_hf.run(str(place / "s.pt"), f"{gcs_bucket}/hf", workdir=str(place / "w"))
    flags.append(f"--cache_dir={place / 'copies'}")
    lm_eval_tasks.main([f"{gcs_bucket}/hf", str(place / "again"), *flags])
    again = json.loads((place / "again" / "lm_eval.json").read_text())
    assert again["results"] == found["results"]


@needs_lm_eval
@pytest.mark.parametrize(("given", "largest"), [("auto", "auto"), ("4", 4)])
def test_batches_are_as_large_as_asked_for(
    place: Path, given: str, largest: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not everything in one, which a real task's examples have no room for."""
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    asked = []
    made = HFLM.__init__

    def observed(self: Any, *args: Any, **options: Any) -> None:
        asked.append(options["batch_size"])
        made(self, *args, **options)

    monkeypatch.setattr(HFLM, "__init__", observed)
    flags = [f"--tasks={place / 'mine.yaml'}", f"--local_workdir={place / 'w'}"]
    lm_eval_tasks.main([str(place / "hf"), str(place / given), f"--micro_batch={given}", *flags])
    assert asked == [largest]


@needs_lm_eval
@pytest.mark.parametrize(
    ("tasks", "status", "message"),
    [
        ("{}/none.yaml", 2, "none.yaml cannot be read"),
        ("{}/data.jsonl.yaml", 2, "describes no task of lm-eval: it has no 'task: NAME'"),
        ("hellaswg", 2, "lm-eval has no task 'hellaswg'; did you mean hellaswag?"),
        ("{}/absent.yaml", 1, "lm-eval could not run"),
    ],
)
def test_tasks_that_cannot_be_run_are_one_line(
    place: Path, tasks: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "data.jsonl.yaml").write_text("[1, 2]")
    check(place, [f"--tasks={tasks.format(place)}"], status, message, capsys)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ([], 2, "there is no task; give --tasks"),
        (["--tasks=a", "--limit=-1"], 2, "--limit=-1 must be at least 0"),
        (["--task=a"], 2, "unknown flag --task; did you mean --tasks?"),
    ],
)
def test_usage_errors(
    place: Path,
    flags: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(place, flags, status, message, capsys)


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_it_says_how_to_get_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(place, ["--tasks=piqa"], 2, "pip install 'liquid-annealing[lm-eval]'", capsys)


def check(
    place: Path,
    flags: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line, that status, and nothing written."""
    set_up_logging()
    argv = [str(place / "hf"), str(place / "refused"), *flags, f"--local_workdir={place / 'w'}"]
    assert run_command(lm_eval_tasks.main, argv) == status
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert message in json.loads(errors.splitlines()[-1])["message"]
    assert not (place / "refused").exists()


def test_no_setting_has_the_name_of_another_commands() -> None:
    others = SETTINGS.keys() | TARGET_SETTINGS.keys() | SAMPLE_SETTINGS.keys()
    assert not LM_EVAL_SETTINGS.keys() & others


def test_only_finite_numbers_are_metrics() -> None:
    results = {
        "a": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "a", "sample_len": 3},
        "b": {"ppl,none": float("nan"), "exact,strict": 1, "note,none": "N/A"},
    }
    assert lm_eval_tasks.numbers(results) == {"a acc": 0.5, "b exact,strict": 1.0}
