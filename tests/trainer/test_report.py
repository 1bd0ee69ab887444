"""The report on a training: its numbers, what it warns of, what it never shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.reports.pages import Page, check_self_contained
from tests.trainer.reports.records import SPLIT, write_run
from trainer import report
from trainer.metrics.lines import METRICS
from trainer.reports.runs import Run
from trainer.runtime.commands import run_command

TEACHER = {64: 3.05, 128: 2.99}


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    parsed = map(json.loads, (run / METRICS).read_text().splitlines())
    return [line for line in parsed if line["kind"] == kind]


def write_evaluation(directory: Path, losses: dict[tuple[int, int], float]) -> Path:
    """``metrics.json`` of two checkpoints, by the context trained at and the one evaluated at."""
    rows = [
        {
            "checkpoint": f"{trained}/best.pt",
            "step": 240 if trained == 64 else 120,
            "trained_at": trained,
            "context": context,
            "student_loss": loss,
            "student_ppl": math.exp(loss),
            "teacher_loss": TEACHER[context],
            "teacher_ppl": math.exp(TEACHER[context]),
        }
        for (trained, context), loss in losses.items()
    ]
    directory.mkdir(exist_ok=True)
    (directory / "metrics.json").write_text(json.dumps(rows))
    return directory


LOSSES = {(64, 64): 3.9, (64, 128): 4.1, (128, 64): 3.6, (128, 128): 3.4}


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("phases")
    short = write_run(root / "anneal", teacher=TEACHER, skipped=3)
    long = write_run(root / "continue", context=128, steps=120, every=20, teacher=TEACHER)
    return [short, long]


@pytest.fixture(scope="module")
def page(phases: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    root = tmp_path_factory.mktemp("report")
    evaluation = write_evaluation(root / "evaluation", LOSSES)
    report.run([str(run) for run in phases], str(root), evaluation=str(evaluation))
    return Page((root / report.HTML).read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(page: Page) -> None:
    check_self_contained(page)
    assert len(page.all("svg")) == 2 + 2 * (2 + 3 + 3 + 3)
    variables = {word.split(")")[0] for word in page.html.split("var(")[1:]}
    assert {f"{name}:" in page.html for name in variables} == {True}


def test_the_losses_are_those_of_the_record(page: Page, phases: list[Path]) -> None:
    for number, run in enumerate(phases):
        recorded = lines_of(run, "evaluation")
        shown = page.tables["Evaluations (2)" if number else "Evaluations"]
        assert shown[0] == ["step", "tokens"] + [
            text for c in (64, 128) for text in (f"student @{c}", f"teacher @{c}", "gap")
        ]
        assert len(shown) == 1 + len(recorded)
        for row, line in zip(shown[1:], recorded, strict=True):
            assert row[0] == str(line["step"])
            for column, context in ((2, 64), (5, 128)):
                student, teacher = (
                    line[f"val_loss_{who}@{context}"] for who in ("student", "teacher")
                )
                assert row[column : column + 3] == [
                    f"{student:.4f}",
                    f"{teacher:.4f}",
                    f"+{student - teacher:.4f}",
                ]


def test_the_best_checkpoint_is_marked_with_its_reason(page: Page, phases: list[Path]) -> None:
    end = lines_of(phases[0], "end")[0]
    row = page.marked["Checkpoints"]
    assert row[0] == str(end["best_step"]) == page.marked["Evaluations"][0]
    assert row[2] == f"val_loss_student {end['best_value']:.4f}"
    assert row[3] == "picked: the lowest val_loss_student of 6 evaluations"


def test_what_came_of_the_gap(page: Page) -> None:
    rows = page.tables["Checkpoints and teacher, by context"][1:]
    assert [row[0] for row in rows] == ["64", "64", "128", "128"]
    assert rows[0][2:] == ["3.9000", "49.40", "–", "3.0500", "21.12", "–"]
    assert rows[1][2:] == ["3.6000", "36.60", "−0.3000", "3.0500", "21.12", "35.3\u00a0%"]
    assert rows[3][2:] == ["3.4000", "29.96", "−0.7000", "2.9900", "19.89", "63.1\u00a0%"]
    assert "is read through its table stretched" in page.text


def test_what_a_reader_is_warned_of(page: Page) -> None:
    assert "3 updates were skipped: their gradients were not finite." in page.text
    assert f"over 16,384 of the {SPLIT:,} tokens of the validation split" in page.text
    assert "The best evaluation is the last one" in page.text


def test_settings_have_sources_and_secrets_are_hidden(page: Page) -> None:
    given = page.tables["Settings"][1:]
    assert ["block_size", "64", "command line"] in given
    assert ["hf_token_value", "***", "command line"] in given
    assert page.tables["Settings left at their defaults"][1:] == [["dropout", "0.0", "default"]]
    assert "hf_secretsecret" not in page.html


def test_markdown_and_the_short_form_say_the_same(
    phases: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = write_evaluation(tmp_path / "evaluation", LOSSES)
    report.main([*map(str, phases), f"--output={tmp_path}", f"--evaluation={evaluation}"])
    printed = capsys.readouterr().out
    text = (tmp_path / report.MARKDOWN).read_text(encoding="utf-8")
    last = lines_of(phases[0], "evaluation")[-1]
    for value in ("3.4000", "−0.7000", "63.1 %", f"{last['val_loss_student@64']:.4f}"):
        assert value in text
        assert value in printed
    assert "hf_secretsecret" not in text
    assert text.count("\n## Phase") == 2
    assert len(printed.splitlines()) < 16


HOSTILE = '<img src="http://a.b/c" onerror=alert(1)> & $x_{1}$ </style><script>x</script>'


def test_what_comes_from_data_stays_text(tmp_path: Path) -> None:
    """A directory, a setting and samples that hold HTML, and what Markdown and TeX would take."""
    run = write_run(
        tmp_path / "<b>run</b>",
        teacher=TEACHER,
        settings={"dataset_name": HOSTILE, HOSTILE: 1, "my_api_key": "sesame"},
    )
    sample = {"prompt": HOSTILE, "student": f"{HOSTILE}\nsecond line", "teacher": None}
    (tmp_path / "samples.json").write_text(json.dumps([sample]))
    report.run([str(run)], str(tmp_path), samples=str(tmp_path / "samples.json"))
    html = (tmp_path / report.HTML).read_text(encoding="utf-8")
    page = Page(html)
    assert page.text.count(HOSTILE) == 4
    assert "<script" not in html
    assert "<img" not in html
    assert "sesame" not in html
    assert not page.all("b") or all(not e.attributes for e in page.all("b"))
    check_self_contained(Page(html.replace("http://a.b/c", "")))
    text = (tmp_path / report.MARKDOWN).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "sesame" not in text


def test_a_long_run_makes_no_long_page(tmp_path: Path) -> None:
    """8,000 log lines and 1,000 evaluations."""
    run = write_run(tmp_path / "run", steps=8_000, every=8, log_interval=1, teacher=TEACHER)
    report.run([str(run)], str(tmp_path))
    page = Page((tmp_path / report.HTML).read_text(encoding="utf-8"))
    assert len(page.html) < 1_000_000
    rows = page.tables["Evaluations"]
    assert 40 < len(rows) < 70
    assert (rows[1][0], rows[-1][0]) == ("8", "8,000")
    assert page.marked["Evaluations"][0] == "8,000"
    assert "of 1,000 evaluations; metrics.jsonl has all of them" in page.text
    check_self_contained(page)


NAN = {"val_loss_student@64": math.nan}
ODD = {
    "not begun": ({"steps": 0, "ended": False}, "The run has not ended"),
    "no evaluation": ({"steps": 40, "every": 0, "ended": False}, "no validation loss"),
    "no teacher": ({}, "The run had no teacher (alpha was 0)"),
    "teacher is worse": ({"teacher": {64: 9.0, 128: 9.0}}, "no gap to close"),
    "past the teacher": ({"teacher": {64: 3.0}}, "At context 128 there is no loss of the teacher"),
    "one loss lost": (
        {"changed": {80: NAN, 90: {"loss": math.nan}}, "teacher": TEACHER},
        "At context 64, 1 of 6 evaluations are not finite",
    ),
    "all losses lost": (
        {"changed": {step: NAN | {"loss": math.inf} for step in range(1, 241)}},
        "No checkpoint was called best",
    ),
    "one evaluation": ({"every": 1000, "teacher": TEACHER}, "of 1 evaluation"),
    "unknown numbers": (
        {"changed": {80: {"tokens": 1e300, "kd": 1e308, "ce": -1e308}}},
        "Evaluations",
    ),
}


@pytest.mark.parametrize(("options", "told"), ODD.values(), ids=ODD)
def test_odd_runs(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    run = write_run(tmp_path / "run", **options)
    report.run([str(run)], str(tmp_path))
    page = Page((tmp_path / report.HTML).read_text(encoding="utf-8"))
    assert told in page.text
    assert "nan" not in page.text.lower().replace("not finite", "").split()
    check_self_contained(page)


def test_runs_of_different_contexts_stand_in_one_report(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", context=32, contexts=(32,), teacher={32: 3.0}),
        write_run(tmp_path / "b", context=256, contexts=(256,)),
    ]
    report.run([str(run) for run in runs], str(tmp_path))
    page = Page((tmp_path / report.HTML).read_text(encoding="utf-8"))
    assert "Training at context 32, then 256" in page.text
    check_self_contained(page)


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (["{missing}"], 1, "no run has recorded its metrics there"),
        (["{damaged}"], 1, "line 2: it is not JSON"),
        (["{run}", "--samples={damaged}/metrics.jsonl"], 2, "--samples="),
        (["{run}", "--samples={words}"], 2, "entry 1 is {'student': 3}; give"),
        (["{run}", "--evaluation={words}"], 1, "row 1: it has no 'checkpoint'"),
        (["{run}", "--evaluation={missing}"], 1, "metrics.json"),
        (["{run}", "--evaluation=s3://a/b"], 2, "neither gs://bucket/path nor a local path"),
        ([], 2, "required: RUN"),
        (["{run}", "--outptu=x"], 2, "did you mean --output?"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    phases: list[Path],
    tmp_path: Path,
    more: list[str],
    status: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    header = (phases[0] / METRICS).read_bytes().split(b"\n")[0]
    (damaged / METRICS).write_bytes(header + b"\nrubbish\n")
    (tmp_path / "words.json").write_text('[{"student": 3}]')
    places = {"run": phases[0], "missing": tmp_path / "missing", "damaged": damaged}
    places |= {"words": tmp_path / "words.json"}
    output = tmp_path / "out"
    argv = [f"--output={output}", *(text.format(**places) for text in more)]
    assert run_command(report.main, argv) == status
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert not output.exists()


def test_a_stage_leaves_a_report_even_of_runs_that_recorded_nothing(tmp_path: Path) -> None:
    html, text = tmp_path / "report.html", tmp_path / "report.md"
    evaluation = write_evaluation(tmp_path / "evaluation", LOSSES)
    missing = str(tmp_path / "missing")
    report.write_stage_report([missing], str(html), text=str(text), evaluation=str(evaluation))
    page = Page(html.read_text(encoding="utf-8"))
    assert "A run is left out: there is no" in page.text
    assert "63.1 %" in page.text
    assert "63.1 %" in text.read_text(encoding="utf-8")
    lines = report.stage_lines([missing], str(evaluation))
    assert "63.1 %" in "".join(lines)
    assert lines[-1].startswith("note: A run is left out: there is no")
    (evaluation / "metrics.json").write_text("rubbish")
    report.write_stage_report([missing], str(html), evaluation=str(evaluation))
    assert "The report could not be made" in Page(html.read_text(encoding="utf-8")).text


def test_the_view_of_a_run(phases: list[Path]) -> None:
    run = Run.read(str(phases[0]))
    assert (run.context, run.contexts, run.step) == (64, [64, 128], 240)
    assert run.tokens == 240 * 16 * 64
    assert run.evaluation_seconds == pytest.approx(6 * 1.5)
    assert run.picked is not None
    assert run.picked.names[0] == "best.pt"
    assert run.loss_at(run.picked.step, 64) == run.picked.value
