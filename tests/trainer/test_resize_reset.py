"""The resize stage: what it takes from checkpoints and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.samples import save_student
from trainer import resize_reset
from trainer.checkpoints.reading import read_checkpoint
from trainer.models.positions import resize_positions
from trainer.runtime.commands import run_command
from trainer.runtime.errors import CheckpointError, LiquidError, UsageError

ROTARY = {"pos_embedding": "rotary", "positions": 0, "rope_scale": 2.0}


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """A checkpoint of 40 by 5 heads with 32 positions, the output, and the work directory."""
    save_student(tmp_path / "s.pt")
    return [str(tmp_path / "s.pt"), str(tmp_path / "o.pt"), f"--local_workdir={tmp_path / 'w'}"]


@pytest.mark.parametrize("shapes", [{"n_heads": 5}, ROTARY], ids=["5-heads", "rotary"])
def test_shapes_come_from_the_checkpoint(tmp_path: Path, shapes: dict[str, Any]) -> None:
    student = save_student(tmp_path / "s.pt", **shapes)
    argv = [str(tmp_path / "s.pt"), str(tmp_path / "o.pt"), "--block_size=64"]
    resize_reset.main([*argv, f"--local_workdir={tmp_path / 'w'}"])
    made = read_checkpoint(tmp_path / "o.pt")
    assert (made.step, made.optimizer, made.meta["block_size"]) == (0, None, 64)
    assert made.meta["model"] == student.config.as_dict() | {"positions": 64 if student.pos else 0}
    for name, value in student.state_dict().items():
        wanted = resize_positions(value, 32, 64) if name == "pos.weight" else value
        assert torch.equal(made.weights[name], wanted), name


def test_heads_and_positions_that_no_metadata_tells(tmp_path: Path) -> None:
    save_student(tmp_path / "bare.pt", described=False)
    argv = [str(tmp_path / "bare.pt"), str(tmp_path / "o.pt"), "--block_size=64"]
    argv.append(f"--local_workdir={tmp_path / 'w'}")
    with pytest.raises(CheckpointError, match=r"bare\.pt: .* 12 heads do not divide; give --n_h"):
        resize_reset.main(argv)
    with pytest.raises(CheckpointError, match=r"bare\.pt does not tell how many of its 32 pos"):
        resize_reset.main([*argv, "--n_heads=5"])
    assert not (tmp_path / "o.pt").exists()
    resize_reset.main([*argv, "--n_heads=5", "--trained_positions=24"])
    assert read_checkpoint(tmp_path / "o.pt").meta["model"]["n_heads"] == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_heads=4"], "--n_heads=4: the checkpoint {} has 5; leave it out"),
        (["--n_heads=0"], "--n_heads=0 must be at least 1"),
        (["--trained_positions=0"], "--trained_positions=0 must be at least 1"),
        (["--trained_positions=33"], "--trained_positions=33: the table of {} has 32 rows"),
        # 2^31 rows of 40 columns are 1280 GiB while they are made
        (["--block_size=2147483647"], "--block_size=2147483647: stretching 32 positions to as man"),
    ],
)
def test_usage_errors(
    places: list[str],
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(resize_reset.main, [*places, "--block_size=64", *flags]) == 2
    line = json.loads(capsys.readouterr().err.splitlines()[-1])["message"]
    assert line.startswith(message.format(tmp_path / "s.pt"))
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.parametrize("trained", [0, -1, 33])
def test_positions_that_no_command_line_has_checked(
    places: list[str], tmp_path: Path, trained: int
) -> None:
    message = f"--trained_positions={trained}: the table of .* has 32 rows; give 1 to 32"
    with pytest.raises(UsageError, match=message):
        resize_reset.run(*places[:2], 64, trained_positions=trained, workdir=str(tmp_path))


def test_a_rotary_student_has_no_table(tmp_path: Path) -> None:
    save_student(tmp_path / "s.pt", **ROTARY)
    with pytest.raises(UsageError, match="--trained_positions=8: .* has rotary positions, no tab"):
        resize_reset.run(
            *(str(tmp_path / name) for name in ("s.pt", "o.pt")),
            64,
            trained_positions=8,
            workdir=str(tmp_path),
        )


def test_outputs_that_cannot_be_written_are_told_first(tmp_path: Path, gcs_bucket: str) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for output, message in (
        (str(tmp_path / "pipe"), "pipe' failed: it is a pipe, not a file"),
        (str(tmp_path), "is a directory; give the path of the file to write"),
        (f"{tmp_path}/new/", "names no file"),
        (str(tmp_path / "file" / "o.pt"), "a file is in the way"),
        ("/proc/none/o.pt", "writing to '/proc' failed"),
        ("", "'' is neither gs://bucket/path nor a local path"),
        (gcs_bucket, "names no file"),
        (f"{gcs_bucket}-none/o.pt", "does not exist"),
    ):
        with pytest.raises(LiquidError, match=message):
            resize_reset.run("absent.pt", output, 64, workdir=str(tmp_path / "w"))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "pipe"}
