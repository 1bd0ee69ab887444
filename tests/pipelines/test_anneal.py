"""The pipeline in the kfp local runner: its real outputs, and what a rerun does again."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainer
from pipelines.local import LocalRun, _Readable, code_digest, run_pipeline
from pipelines.stages import ONLINE, STAGES
from tests.interrupts import with_interrupts
from trainer.checkpoints.reading import read_checkpoint
from trainer.data.streams import open_streams
from trainer.models.positions import resize_positions
from trainer.models.student import Student
from trainer.runtime.errors import LiquidError
from trainer.runtime.provenance import commit_of
from trainer.storage.digests import digest_at
from trainer.storage.files import crc32c_of

TITLES = [
    stage.title
    for stage in STAGES.values()
    if stage.only_if_teacher in ("", ONLINE) and not stage.setting
    if "lm_eval_tasks" not in stage.only_with
]

LONG = {"anneal_train_steps": 100_000, "anneal_log_interval": 1}
"""A training that does not end by itself."""


def task_directory(run: LocalRun, task: str) -> Path:
    """Where a task of the first run has written."""
    return Path(run.outputs["report"].path).parents[1] / task


def sidecars(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name.removesuffix(".meta.json"): json.loads(path.read_text())
        for path in directory.glob("*.meta.json")
    }


def artifacts_of(run: LocalRun) -> dict[tuple[str, str], dict[str, Any]]:
    """By task and name: the metadata of the artifacts of the first run, as the stages gave it."""
    paths = task_directory(run, "train").parent.glob("*/executor_output.json")
    return {
        (path.parent.name, name): artifact["metadata"]
        for path in paths
        for name, entry in json.loads(path.read_text()).get("artifacts", {}).items()
        for artifact in entry["artifacts"]
    }


def crc32c_text(path: Path) -> str:
    return f"crc32c:{crc32c_of(path)}"


def test_a_chain_of_digests_leads_from_the_export_to_the_tokens(first_run: LocalRun) -> None:
    """As the artifacts' metadata names them, and as the files are."""
    made = artifacts_of(first_run)
    exported = made["export-hf", "exported"]
    assert exported["digest"] == digest_at(str(task_directory(first_run, "export-hf") / "exported"))
    after = exported["input checkpoint"]
    assert after == crc32c_text(Path(first_run.outputs["after"].path))
    assert after == first_run.outputs["after"].metadata["digest"]
    checkpoints = made["train-2", "checkpoints"]
    assert made["pick-best-2", "best"]["input checkpoints"] == checkpoints["digest"]
    resized = made["resize-reset", "resized"]
    written = task_directory(first_run, "resize-reset") / "resized.pt"
    assert checkpoints["input initial"] == resized["digest"] == crc32c_text(written)
    before = first_run.outputs["before"]
    assert resized["input checkpoint"] == crc32c_text(Path(before.path))
    assert before.metadata["input checkpoints"] == made["train", "checkpoints"]["digest"]
    tokens = made["prepare-tokens", "tokens"]
    streams = open_streams(task_directory(first_run, "prepare-tokens") / "tokens")
    assert tokens["digest"] == f"sha256:{streams.info.fingerprint}"
    for task in ("train", "train-2"):
        assert made[task, "checkpoints"]["input tokens"] == tokens["digest"]
    origin = sidecars(task_directory(first_run, "train-2") / "checkpoints")["final.pt"]["origin"]
    assert origin["digest"] == resized["digest"]


def test_every_artifact_says_where_it_comes_from(first_run: LocalRun) -> None:
    made = artifacts_of(first_run)
    assert len(made) >= 16
    commit = commit_of(Path(str(trainer.__file__)).parent)
    for name, metadata in made.items():
        assert re.fullmatch(r"crc32c:.{8}|sha256:[0-9a-f]{24}", metadata["digest"]), name
        assert [key for key in metadata if key.startswith("input ")], name
        assert metadata["code"] == trainer.__version__
        assert metadata.get("commit") == commit
        assert "image" not in metadata, "there is none here"
    for task, name in (("train", "metrics.json"), ("evaluate", "report.html")):
        path = task_directory(first_run, task) / name
        assert made[task, path.stem]["digest"] == crc32c_text(path)


def test_every_task_ran_once(first_run: LocalRun) -> None:
    # The evaluation and the export do not wait for one another
    assert sorted(first_run.ran) == sorted(TITLES)


def test_a_run_has_a_directory_of_its_own(
    first_run: LocalRun, work: Path, parameters: dict[str, Any]
) -> None:
    """With what made it, its log, and all that its stages wrote."""
    directory = first_run.directory
    assert directory.parent == work / "runs"
    described = json.loads((directory / "parameters.json").read_text())
    assert described["parameters"] == parameters
    assert described["code"] == code_digest()
    assert Path(first_run.outputs["after"].path).is_relative_to(directory)
    log = (directory / "pipeline.log").read_text()
    assert "finished with status" in log
    assert "weight_decay = 0.1 (default)" in log  # all settings, also those that are as usual


@pytest.mark.parametrize(
    ("task", "output"), [("train", "before"), ("train-2", "after")], ids=["anneal", "continue"]
)
def test_the_checkpoint_picked_is_the_argmin_of_the_recorded_losses(
    first_run: LocalRun, task: str, output: str
) -> None:
    directory = task_directory(first_run, task) / "checkpoints"
    losses = {
        meta["step"]: meta["metrics"]["val_loss_student"]
        for meta in sidecars(directory).values()
        if meta["metrics_step"] == meta["step"]
    }
    picked = read_checkpoint(Path(first_run.outputs[output].path))
    assert len(losses) >= 2
    assert picked.step == min(losses, key=lambda step: (losses[step], step))
    model = first_run.outputs[output]
    assert model.metadata["value"] == losses[picked.step]
    assert model.metadata["step"] == picked.step
    assert model.metadata["block_size"] == picked.meta["block_size"]
    assert model.metadata["pos_embedding"] == "absolute"


def test_the_resized_checkpoint_has_the_new_table_and_step_zero(first_run: LocalRun) -> None:
    resized = read_checkpoint(task_directory(first_run, "resize-reset") / "resized.pt")
    source = read_checkpoint(Path(first_run.outputs["before"].path))
    expected = resize_positions(source.weights["pos.weight"], 32, 64)
    assert torch.equal(resized.weights["pos.weight"], expected)
    assert resized.step == 0
    assert resized.optimizer is None
    assert resized.meta["origin"]["step"] == source.step
    assert resized.meta["origin"]["block_size"] == 32


def test_the_continuation_starts_from_the_resized_weights(first_run: LocalRun) -> None:
    meta = sidecars(task_directory(first_run, "train-2") / "checkpoints")["final.pt"]
    assert (meta["step"], meta["block_size"], meta["kd_alpha"]) == (4, 64, 0.4)
    assert meta["global_batch"] == 4
    assert meta["origin"]["checkpoint"].endswith("resize-reset/resized.pt")


def test_the_table_has_every_context_for_both_checkpoints(first_run: LocalRun) -> None:
    directory = task_directory(first_run, "evaluate")
    rows = json.loads((directory / "metrics.json").read_text())
    assert [(row["trained_at"], row["context"]) for row in rows] == [
        (32, 32),
        (32, 64),
        (64, 32),
        (64, 64),
    ]
    recorded = read_checkpoint(Path(first_run.outputs["after"].path)).meta["metrics"]
    assert rows[3]["student_loss"] == pytest.approx(recorded["val_loss_student@64"], rel=1e-6)
    assert rows[3]["teacher_loss"] == pytest.approx(recorded["val_loss_teacher@64"], rel=1e-6)
    page = (directory / "report.html").read_text(encoding="utf-8")
    text = (directory / "table.md").read_text(encoding="utf-8")
    for loss in (f"{row['student_loss']:.4f}" for row in rows):
        assert loss in page
        assert loss in text
    assert "Phase 2: context 64" in page
    assert first_run.outputs["report"].path == str(directory / "report.html")


def test_what_a_rerun_does_again(
    first_run: LocalRun,
    work: Path,
    parameters: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unchanged: nothing. A changed last train stage: it and what follows. The first: all of it."""
    unchanged = run_pipeline(work, parameters)
    assert unchanged.ran == []
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("──")]
    assert sorted(told) == sorted(f"── {title}: taken from the cache" for title in TITLES)
    assert unchanged.outputs["report"].path == first_run.outputs["report"].path
    last = run_pipeline(work, parameters | {"continue_train_steps": 3})
    assert last.ran[:2] == ["continue", "pick-best-continued"]
    assert sorted(last.ran[2:]) == ["evaluate", "export"]
    assert last.cached == [title for title in TITLES if title not in last.ran]
    first = run_pipeline(work, parameters | {"anneal_train_steps": 4})
    assert {*TITLES} - {*first.ran} == {"prepare", "teacher-online"}


def exports(work: Path) -> list[Path]:
    return sorted(work.glob("runs/*/*/export-hf/exported"))


def test_the_final_student_is_exported_once(
    first_run: LocalRun, work: Path, parameters: dict[str, Any]
) -> None:
    """Again only where its inputs change: another license is one, another table is none."""
    here, before = task_directory(first_run, "export-hf") / "exported", exports(work)
    source = read_checkpoint(Path(first_run.outputs["after"].path))
    student = Student(source.student_config())
    student.load_state_dict(source.weights)
    model = AutoModelForCausalLM.from_pretrained(str(here))
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, student.eval().logits(ids), atol=1e-5)
    assert AutoTokenizer.from_pretrained(str(here)).model_max_length == 64
    assert "license: unknown" in (here / "README.md").read_text()
    table = run_pipeline(work, parameters | {"evaluate_micro_batch": 4})
    assert (table.ran, exports(work)) == (["evaluate"], before)
    licensed = run_pipeline(work, parameters | {"export_license": "apache-2.0"})
    assert licensed.ran == ["export"]
    (new,) = set(exports(work)) - set(before)
    assert "license: apache-2.0" in (new / "README.md").read_text()
    off = run_pipeline(work, parameters | {"export": False})
    assert off.ran == []
    assert off.cached == [title for title in TITLES if title != "export"]


@pytest.mark.soak
def test_other_code_and_no_cache_run_again(
    work: Path,
    parameters: dict[str, Any],
    first_run: LocalRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fails = parameters | {"anneal_alpha_schedule": "0:7"}

    def prepares() -> bool:
        with pytest.raises(LiquidError, match=r"^anneal failed"):
            run_pipeline(work, fails)
        shown = capsys.readouterr().out
        ran = "── prepare: success after" in shown
        assert ("── prepare: started" in shown) == ran
        assert "── anneal: started" in shown
        return ran

    assert not prepares()
    with monkeypatch.context() as patched:
        patched.setenv("CACHE", "0")
        assert prepares()
    copy = shutil.copytree(Path(str(trainer.__file__)).parent, work / "other")
    monkeypatch.setattr(trainer, "__file__", str(copy / "__init__.py"))
    before = code_digest()
    (copy / "training" / "loop.py").write_text("changed")
    assert code_digest() != before
    assert prepares()


def test_a_failed_stage_is_named_with_its_own_message(
    work: Path, parameters: dict[str, Any], first_run: LocalRun
) -> None:
    with pytest.raises(LiquidError) as caught:
        run_pipeline(work, parameters | {"continue_alpha_schedule": "0:0.5,2:7"})
    message = str(caught.value)
    assert message.startswith("continue failed: --alpha_schedule='0:0.5,2:7': entry 2")
    assert "pipeline.log" in message


@pytest.mark.parametrize(
    ("number", "status", "more", "awaited"),
    [
        (signal.SIGTERM, 143, LONG, "step 2/100000"),
        pytest.param(signal.SIGINT, 130, LONG, "step 2/100000", marks=pytest.mark.soak),
        # A share, which another thread runs; those behind it are not begun
        (signal.SIGTERM, 143, {"teacher": "cached"}, "files of these targets are to be made here"),
    ],
    ids=["SIGTERM", "SIGINT", "in a loop"],
)
def test_the_task_that_runs_ends_with_the_run(
    parameters: dict[str, Any],
    tmp_path: Path,
    number: signal.Signals,
    status: int,
    more: dict[str, Any],
    awaited: str,
) -> None:
    """A signal to the run alone, as from a process manager."""
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from pipelines.local import ending_tasks, run_pipeline\n"
        "from trainer.runtime.commands import run_command\n"
        "def main(argv):\n"
        "    with ending_tasks():\n"
        "        run_pipeline(Path(argv[0]), json.loads(argv[1]))\n"
        "raise SystemExit(run_command(main))\n"
    )
    given = parameters | more
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), json.dumps(given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'trainer_image'}"},
        start_new_session=True,
        preexec_fn=with_interrupts,
    )
    assert run.stdout is not None
    while awaited not in (line := run.stdout.readline()):
        assert line, run.communicate()[1]
    children = psutil.Process(run.pid).children(recursive=True)
    assert any(child.is_running() for child in children)
    run.send_signal(number)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == status, errors
    assert "Traceback" not in errors
    assert "the one that was running starts over" in errors
    assert not [child for child in children if child.is_running()]
    assert len(list(tmp_path.glob("runs/*/*/for-loop-*"))) == ("teacher" in more)


def test_an_error_of_another_kind_is_shown_as_it_is() -> None:
    """What Python prints last of a traceback, whatever printed around it."""
    code = "try:\n    {}['a']\nexcept KeyError:\n    raise ValueError('a lies\\n\\nhere')"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    stream = _Readable(io.StringIO(), io.StringIO(), LocalRun(()))
    stream.write("loading\n" + textwrap.indent(printed, "    ") + "\x1b[91mdone\x1b[0m\n")
    assert stream.last_error == "ValueError: a lies"
