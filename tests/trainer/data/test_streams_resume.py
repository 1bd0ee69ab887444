"""A run goes on with the tokens it was trained on, though the same settings may name others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.metadata import tokens_of
from trainer.checkpoints.names import FINAL, sidecar_name, step_name
from trainer.checkpoints.reading import read_checkpoint
from trainer.data.streams import INFO_NAME
from trainer.runtime.errors import DataError
from trainer.training.run import run


@pytest.fixture
def settings(
    settings: dict[str, object], corpus: Path, tokenizer_dir: Path, tmp_path: Path
) -> dict[str, object]:
    """Three updates on data of its own; the student alone."""
    source = tmp_path / "data"
    source.mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        (source / name).write_bytes((corpus / name).read_bytes())
    changes = {"dataset_name": str(source), "teacher_name": str(tokenizer_dir), "alpha": 0.0}
    return settings | changes | {"train_steps": 3, "save_every": 1}


def change(settings: dict[str, object]) -> None:
    with Path(str(settings["dataset_name"]), "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"text": "one document more"}))


def stop_early(settings: dict[str, object]) -> Path:
    """Leave the snapshot of update 2 of 3 alone; returns it."""
    run(settings)
    work = Path(str(settings["local_workdir"]))
    own = work / step_name(2)
    for path in work.glob("*.pt*"):
        if path.name not in (own.name, sidecar_name(own.name)):
            path.unlink()
    return own


def test_a_run_does_not_go_on_with_other_tokens(settings: dict[str, object]) -> None:
    own = stop_early(settings)
    result = run(settings)
    assert result is not None
    assert result.step == 3, "with its own tokens it goes on"
    stop_early(settings)
    kept = own.read_bytes()
    change(settings)
    with pytest.raises(DataError, match="was trained on other tokens") as caught:
        run(settings)
    before = tokens_of(read_checkpoint(own).meta)
    infos = Path(str(settings["cache_dir"]), "tokens").glob(f"*/{INFO_NAME}")
    known = {json.loads(path.read_text())["fingerprint"] for path in infos}
    named = [fingerprint for fingerprint in known if fingerprint in str(caught.value)]
    assert len(named) == 2
    assert before in named
    assert "\n" not in str(caught.value)
    assert own.read_bytes() == kept


def test_a_new_phase_may_have_other_tokens(settings: dict[str, object], tmp_path: Path) -> None:
    first = stop_early(settings)
    change(settings)
    second = str(tmp_path / "second")
    result = run(settings | {"resume_gcs_uri": str(first), "local_workdir": second})
    assert result is not None
    final = read_checkpoint(Path(second, FINAL))
    assert tokens_of(final.meta) != tokens_of(read_checkpoint(first).meta)


def test_snapshots_that_do_not_tell_their_tokens_go_on(settings: dict[str, object]) -> None:
    own = stop_early(settings)
    payload = torch.load(own, weights_only=True)
    del payload["meta"]["dataset"]["fingerprint"]
    Snapshot(**payload).write(own)
    change(settings)
    result = run(settings)
    assert result is not None
    assert result.step == 3
