"""Targets of several shards of a few kilobytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trainer import teacher_targets
from trainer.settings.config import TargetSettings, TrainConfig
from trainer.targets import making, shards


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Shards of 40 windows of 64 tokens, 64 bytes each; 8 windows through the teacher at once."""
    patch.setattr(shards, "_SHARD_BYTES", 40 * 64 * 64)
    patch.setattr(making, "_PASS_TOKENS", 8 * 64)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture
def config(tokens_dir: Path, teacher_dir: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        teacher_name=str(teacher_dir),
        tokens_dir=str(tokens_dir),
        local_workdir=str(tmp_path / "work"),
        eval_ctx_lens=(16, 32),
    )


@pytest.fixture
def two_temperatures() -> TargetSettings:
    return TargetSettings(target_temperatures=(1.0, 1.5))


@pytest.fixture(params=["local", "gs"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out" / "targets")
    return f"{request.getfixturevalue('gcs_bucket')}/targets"


@pytest.fixture(scope="session")
def several_shards(root: Path, tokens_dir: Path, teacher_dir: Path) -> Path:
    """Targets for two temperatures; not to be changed."""
    config = TrainConfig(
        teacher_name=str(teacher_dir),
        tokens_dir=str(tokens_dir),
        local_workdir=str(root / "work"),
        eval_ctx_lens=(16, 32),
    )
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        settings = TargetSettings(target_temperatures=(1.0, 1.5))
        teacher_targets.run(config, settings, str(root / "several-shards"))
    return root / "several-shards"


@pytest.fixture
def targets(several_shards: Path, tmp_path: Path) -> Path:
    """A copy of those."""
    return Path(shutil.copytree(several_shards, tmp_path / "targets"))
