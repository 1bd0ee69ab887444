"""The command that makes targets: its flags, its messages, and what it asks for first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.samples import save_teacher
from trainer import entrypoint, teacher_targets
from trainer.runtime.errors import LiquidError, ModelError, UsageError
from trainer.settings.config import SETTINGS, TARGET_SETTINGS
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.layers import settings_from_yaml
from trainer.targets.shards import read_index


@pytest.fixture
def flags(teacher_dir: Path, tokens_dir: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "teacher_name": teacher_dir,
        "tokens_dir": tokens_dir,
        "local_workdir": tmp_path / "work",
    }


def command(output: Path | str, flags: dict[str, object]) -> None:
    teacher_targets.main([str(output), *(f"--{name}={value}" for name, value in flags.items())])


def test_its_own_settings_are_flags_of_no_other_command(tmp_path: Path) -> None:
    assert not SETTINGS.keys() & TARGET_SETTINGS.keys()
    given = build_parser("x", "", only=[*TARGET_SETTINGS])
    args = given.parse_args(["--target_temperatures=1.5,1,1.5", "--workers=3", "--worker=0"])
    assert settings_from_args(args) == {
        "target_temperatures": (1.0, 1.5),
        "workers": 3,
        "worker": 0,
    }
    for name in TARGET_SETTINGS:
        with pytest.raises(UsageError, match=f"unknown flag --{name}"):
            entrypoint.main([f"--{name}=1"])
        (tmp_path / "a.yaml").write_text(f"{name}: 1")
        with pytest.raises(UsageError, match=f"unknown setting '{name}'"):
            settings_from_yaml(str(tmp_path / "a.yaml"))


def test_help_tells_every_flag() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "trainer.teacher_targets", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in (*TARGET_SETTINGS, "join", "teacher_name", "tokens_dir", "eval_ctx_lens", "seed"):
        assert f"--{name} " in text, name
    for name in ("alpha", "block_size", "teacher_targets"):
        with pytest.raises(UsageError, match=f"unknown flag --{name}"):
            teacher_targets.main([f"--{name}=1", "out"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_name": ""}, "missing: --teacher_name"),
        ({"tokens_dir": ""}, "missing: --dataset_name"),
        ({"teacher_context": 65}, "--teacher_context=65 is over the 64 positions of teacher"),
        ({"teacher_context": "x"}, "--teacher_context='x': a whole number is needed"),
        ({"target_bytes": 12, "target_temperatures": "1,2"}, "12 bytes are too few"),
        ({"target_bytes": 0}, "--target_bytes=0 must be at least 1"),
        ({"target_temperatures": "1,x"}, "--target_temperatures='1,x': numbers are needed"),
        ({"target_temperatures": "nan"}, "--target_temperatures=nan must be above 0"),
        ({"target_temperatures": "0.0005"}, "temperatures"),
        ({"eval_ctx_lens": "32,500"}, None),
        ({"eval_ctx_lens": "x"}, "--eval_ctx_lens='x'"),
        ({"workers": 4}, "--workers=4 needs --worker, from 0 to 3"),
        ({"join": ""}, "'' is neither gs://bucket/path nor a local path"),
        ({"join": "ftp://x"}, "'ftp://x' is neither gs://bucket/path nor a local path"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(
    flags: dict[str, object], changes: dict[str, object], message: str | None, tmp_path: Path
) -> None:
    """A context past the teacher's longest is left out, as it is in training."""
    output = tmp_path / "out"
    if message is None:
        command(output, flags | changes)
        assert read_index(str(output)).made.contexts == (32, 64)
        return
    with pytest.raises(LiquidError, match=message) as caught:
        command(output, flags | changes)
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_a_teacher_of_a_smaller_vocabulary_is_told_before_its_weights_are_loaded(
    flags: dict[str, object], tokenizer_dir: Path, tmp_path: Path
) -> None:
    small = save_teacher(tmp_path / "small", tokenizer_dir, vocab=500, positions=64)
    (small / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="vocabulary of 500 is smaller than the student's of 512"):
        command(tmp_path / "out", flags | {"teacher_name": small})


def test_join_needs_neither_teacher_nor_tokens(targets_dir: Path, tmp_path: Path) -> None:
    teacher_targets.main([str(tmp_path / "out"), f"--join={targets_dir}"])
    assert read_index(str(tmp_path / "out")).fingerprint == read_index(str(targets_dir)).fingerprint


def test_a_second_command_for_whole_targets_changes_nothing(
    flags: dict[str, object], targets_dir: Path
) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in targets_dir.iterdir()}
    command(targets_dir, flags | {"target_temperatures": "1.0,1.5", "eval_ctx_lens": "16,32"})
    assert {path: path.stat().st_mtime_ns for path in targets_dir.iterdir()} == stamps
