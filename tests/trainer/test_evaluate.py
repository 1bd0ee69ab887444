"""The evaluation stage: what it takes from checkpoints, where it writes, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.samples import save_student
from trainer import evaluate
from trainer.data.batches import IGNORED
from trainer.data.streams import streams_for
from trainer.models.student import Student
from trainer.runtime.commands import run_command
from trainer.runtime.errors import CheckpointError, LiquidError, UsageError
from trainer.settings.config import TrainConfig
from trainer.settings.layers import resolve
from trainer.storage.places import open_location
from trainer.training import evaluation
from trainer.training.evaluation import Evaluator, cross_entropy_sum
from trainer.training.precision import choose_precision

ROTARY = {"pos_embedding": "rotary", "positions": 0, "rope_scale": 2.0}


@pytest.fixture
def config(settings: dict[str, Any]) -> TrainConfig:
    names = ("teacher_name", "dataset_name", "cache_dir", "local_workdir", "micro_batch")
    asked = {name: settings[name] for name in names}
    asked |= {"eval_ctx_lens": (32, 64), "eval_max_tokens": 300}
    return resolve(asked, {}).config


def flags(config: TrainConfig) -> list[str]:
    names = ("teacher_name", "dataset_name", "cache_dir", "local_workdir", "micro_batch")
    given = [f"--{name}={getattr(config, name)}" for name in names]
    return [*given, "--eval_ctx_lens=32,64", "--eval_max_tokens=300"]


def losses(config: TrainConfig, student: Student, trained: int) -> list[float]:
    """What a student that was never in a file has."""
    config = replace(config, block_size=64)
    evaluator = Evaluator(config, streams_for(config), None, choose_precision(config))
    return [evaluator.student_loss(student, context, trained) for context in (32, 64)]


@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(False, id="eager"),
        pytest.param(True, id="compiled", marks=pytest.mark.soak),
    ],
)
def test_sum_of_cross_entropies(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of two lengths, against one product over the whole vocabulary in fp64."""
    for name in ("_EAGER_ELEMENTS", "_COMPILED_ELEMENTS"):
        monkeypatch.setattr(evaluation, name, 20 * 101)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, 16, generator=generator) for rows in (50, 101))
    bias = torch.randn(101, generator=generator)
    labels = torch.randint(101, (50,), generator=generator)
    labels[::7] = IGNORED
    for given in (None, bias):
        logits = F.linear(hidden.double(), head.double(), None if given is None else given.double())
        counted = labels != IGNORED
        expected = F.cross_entropy(logits[counted], labels[counted], reduction="sum")
        found = cross_entropy_sum(hidden, head, given, labels, compiled=compiled)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shapes", [{"n_heads": 5}, ROTARY], ids=["5-heads", "rotary"])
def test_shapes_come_from_the_checkpoint(
    config: TrainConfig, tmp_path: Path, shapes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither 5 heads nor a rope scale goes with the defaults of the other settings."""
    student = save_student(tmp_path / "s.pt", **shapes)
    evaluate.main([str(tmp_path / "out"), str(tmp_path / "s.pt"), *flags(config)])
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["student_loss"] for row in rows] == losses(config, student, 32)
    assert [(row["step"], row["trained_at"]) for row in rows] == [(7, 32)] * 2
    assert (tmp_path / "out" / "metrics.md").read_text() in capsys.readouterr().out


def test_heads_and_positions_that_no_metadata_tells(config: TrainConfig, tmp_path: Path) -> None:
    student = save_student(tmp_path / "bare.pt", described=False)
    argv = [str(tmp_path / "out"), str(tmp_path / "bare.pt"), *flags(config)]
    with pytest.raises(CheckpointError, match=r"bare\.pt: .* 12 heads do not divide; give --n_h"):
        evaluate.main(argv)
    with pytest.raises(CheckpointError, match=r"bare\.pt does not tell how many of its 32 pos"):
        evaluate.main([*argv, "--n_heads=5"])
    evaluate.main([*argv, "--n_heads=5", "--trained_positions=24"])
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["student_loss"] for row in rows] == losses(config, student, 24)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--n_heads=4", "--n_heads=4: the checkpoint {} has 5; leave it out"),
        ("--n_heads=0", "--n_heads=0 must be at least 1"),
        ("--trained_positions=0", "--trained_positions=0 must be at least 1"),
        ("--trained_positions=33", "--trained_positions=33: the table of {} has 32 rows"),
        ("--teacher_precision=fp8", "--teacher_precision=fp8 is for training"),
        ("--eval_ctx_lens=1000000", "--eval_ctx_lens=1000000 is longer than the validation split"),
    ],
)
def test_usage_errors(
    config: TrainConfig,
    tmp_path: Path,
    flag: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_student(tmp_path / "s.pt")
    argv = [str(tmp_path / "out"), str(tmp_path / "s.pt"), *flags(config), flag]
    assert run_command(evaluate.main, argv) == 2
    line = json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
    assert line.startswith(message.format(tmp_path / "s.pt"))
    assert not (tmp_path / "out").exists()


def test_values_that_no_command_line_has_checked(config: TrainConfig, tmp_path: Path) -> None:
    save_student(tmp_path / "s.pt")
    with pytest.raises(UsageError, match="--n_heads=0 must be at least 1"):
        evaluate.run(config, [str(tmp_path / "s.pt")], str(tmp_path / "out"), n_heads=0)


def test_each_vocabulary_has_its_own_teacher_loss(config: TrainConfig, tmp_path: Path) -> None:
    """The teacher has 520 rows, of which a student may have fewer: others are left out of both."""
    for vocabulary in (512, 520):
        save_student(tmp_path / f"{vocabulary}.pt", vocab_size=vocabulary)
    paths = [str(tmp_path / f"{vocabulary}.pt") for vocabulary in (512, 520)]
    together = evaluate.run(config, paths, str(tmp_path / "both"))
    alone = [row for path in paths for row in evaluate.run(config, [path], str(tmp_path / "one"))]
    assert together == alone
    small, large = ([row for row in together if row.checkpoint == path] for path in paths)
    assert [row.teacher_loss for row in small] < [row.teacher_loss for row in large]


def test_output_to_a_bucket(
    config: TrainConfig, tmp_path: Path, gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_student(tmp_path / "s.pt")
    for _ in range(2):  # the second replaces what the first has written
        rows = evaluate.run(config, [str(tmp_path / "s.pt")], f"{gcs_bucket}/table")
    location = open_location(f"{gcs_bucket}/table")
    assert [entry.name for entry in location.list()] == ["metrics.json", "metrics.md"]
    written = json.loads(location.read_bytes("metrics.json", limit=1 << 20))
    assert [row["student_loss"] for row in written] == [row.student_loss for row in rows]
    assert not list(tmp_path.glob("gs*"))


def test_outputs_that_cannot_be_written_are_told_first(
    config: TrainConfig, tmp_path: Path, gcs_bucket: str
) -> None:
    """No checkpoint and no teacher is there to be loaded."""
    (tmp_path / "file").write_text("mine")
    config = replace(config, teacher_name="none", dataset_name="none")
    for output, message in (
        (str(tmp_path / "file"), "a file is in the way"),
        (str(tmp_path / "file" / "out"), "a file is in the way"),
        ("/proc/none/out", "writing to '/proc' failed"),
        ("", "'' is neither gs://bucket/path nor a local path"),
        ("s3://bucket/out", "'s3://bucket/out' is neither"),
        (f"{gcs_bucket}-none/out", "does not exist"),
    ):
        with pytest.raises(LiquidError, match=message) as caught:
            evaluate.run(config, ["absent.pt"], output)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
