"""Every command with a teacher and a data set that are in a bucket alone, and no hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from google.cloud import storage

from tests.conftest import log_as_it_was
from trainer import entrypoint, evaluate, export_hf, prepare_tokens, sample, teacher_targets
from trainer.checkpoints.snapshots import read_from
from trainer.models.pretrained import Pretrained
from trainer.models.remote_models import revision_of
from trainer.models.teacher import teacher_digest
from trainer.runtime.errors import StorageError
from trainer.targets.shards import read_index


def upload(uri: str, directory: Path) -> str:
    name, _, prefix = uri.removeprefix("gs://").partition("/")
    for path in directory.iterdir():
        blob = storage.Client().bucket(name).blob(f"{prefix}/{path.name}")
        blob.upload_from_filename(str(path))
    return uri


def changed(directory: Path, copy: Path) -> Path:
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": None}))
    return copy


def call(main: object, *positional: object, **settings: object) -> None:
    flags = [f"--{name}={value}" for name, value in settings.items()]
    with log_as_it_was():
        main([*map(str, positional), *flags])  # type: ignore[operator]


def test_from_tokens_to_an_export(
    gcs_bucket: str,
    teacher_dir: Path,
    tokens_dir: Path,
    tmp_path: Path,
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    teacher = upload(f"{gcs_bucket}/teacher", teacher_dir)
    data = upload(f"{gcs_bucket}/corpus", tokens_dir.parent / "small-corpus")
    places = {"cache_dir": tmp_path / "cache", "local_workdir": tmp_path / "work"}
    both = {"teacher_name": teacher, "dataset_name": data, **places}
    tokens, targets, run = (f"{gcs_bucket}/{name}" for name in ("tokens", "targets", "run"))

    call(prepare_tokens.main, tokens, **both)
    call(teacher_targets.main, targets, tokens_dir=tokens, **both)
    assert read_index(targets).made.teacher_digest == teacher_digest(str(teacher_dir))
    revision = revision_of(Pretrained(teacher))
    call(entrypoint.main, **settings | both, teacher_revision=revision, output_gcs_uri=run)
    # A teacher that is named is compared with the targets', of a local copy or not
    for name in (teacher, teacher_dir):
        more = {"tokens_dir": tokens, "teacher_targets": targets, "train_steps": 0}
        call(entrypoint.main, **settings | both | {"teacher_name": name} | more)
    report = tmp_path / "report"
    call(evaluate.main, report, f"{run}/final.pt", eval_ctx_lens=32, eval_max_tokens=1000, **both)
    (row,) = json.loads((report / "metrics.json").read_text())
    assert row["teacher_loss"] > 0
    exported = f"{gcs_bucket}/exported"
    call(export_hf.main, f"{run}/final.pt", exported, **places)
    assert read_from(f"{run}/final.pt", tmp_path).meta["tokenizer"] == teacher
    capsys.readouterr()
    writing = {"prompt": "The if statement", "max_new_tokens": 4, **places}
    call(sample.main, f"{run}/final.pt", "--with_teacher", "--greedy", "--json", **writing)
    written = capsys.readouterr().out
    assert json.loads(written)[0]["teacher"]
    call(sample.main, exported, f"--teacher={teacher}", "--greedy", "--json", **writing)
    assert capsys.readouterr().out == written
    # The run's teacher is meant, not what has taken its place
    upload(teacher, changed(teacher_dir, tmp_path / "changed"))
    for door, arguments in (
        (sample.main, ["--with_teacher"]),
        (export_hf.main, [tmp_path / "new"]),
    ):
        more = writing if door is sample.main else places
        with pytest.raises(StorageError, match=f"was changed: .* not {revision}; put"):
            call(door, f"{run}/final.pt", *arguments, **more)
