"""Formats of checkpoints other than today's: refused in one line, or brought up to date."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.samples import base_package_payload, save_student
from trainer import entrypoint, evaluate, export_hf, pick_best, resize_reset
from trainer.checkpoints import metadata
from trainer.checkpoints.metadata import current_form
from trainer.checkpoints.reading import read_checkpoint
from trainer.checkpoints.sidecar import Sidecar
from trainer.runtime.errors import CheckpointError
from trainer.settings.layers import resolve
from trainer.storage.files import crc32c_of

Settings = dict[str, Any]

NEWER = "is of checkpoint format 2, and this program reads formats up to 1; update the program"


def of_format(path: Path, version: Any, *, sidecar: bool = True) -> Path:
    """A checkpoint whose metadata names a version; a newer one may lack what today's has."""
    save_student(path)
    payload = torch.load(path, weights_only=True)
    payload["meta"]["format_version"] = version
    if version == 2:
        payload["weights"] = payload.pop("model")
    torch.save(payload, path)
    described = path.with_name(f"{path.name}.meta.json")
    if sidecar:
        content = json.loads(described.read_text()) | {"format_version": version}
        del content["crc32c"]
        described.write_text(json.dumps(content))
    else:
        described.unlink()
    return path


@pytest.mark.parametrize("sidecar", [True, False], ids=["sidecar", "file"])
def test_a_newer_checkpoint_is_refused_by_every_command(
    settings: Settings, tmp_path: Path, sidecar: bool
) -> None:
    path = of_format(tmp_path / "best.pt", 2, sidecar=sidecar)
    source, output = str(path), str(tmp_path / "out")
    config = resolve(settings | {"eval_ctx_lens": (32,)}, {}).config
    calls: list[Callable[[], Any]] = [
        lambda: entrypoint.run(settings | {"resume_gcs_uri": source}),
        lambda: export_hf.run(source, output, workdir=str(tmp_path)),
        lambda: resize_reset.run(source, f"{output}/resized.pt", 64, workdir=str(tmp_path)),
        lambda: evaluate.run(config, [source], output),
    ]
    if sidecar:
        calls.append(lambda: pick_best.run([str(tmp_path)], "val_loss_student"))
    for call in calls:
        with pytest.raises(CheckpointError) as caught:
            call()
        assert NEWER in str(caught.value)
        assert "best.pt" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_run_does_not_go_on_behind_a_newer_snapshot(settings: Settings, tmp_path: Path) -> None:
    """An older whole snapshot is there too; a newer program's is not passed over as damaged."""
    entrypoint.run(settings)
    work = tmp_path / "work"
    sidecar = work / "final.pt.meta.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"format_version": 2}))
    before = {path: path.stat().st_mtime_ns for path in work.glob("*.pt*")}
    with pytest.raises(CheckpointError, match=f"^sidecar of final.pt {NEWER}$"):
        entrypoint.run(settings)
    assert before == {path: path.stat().st_mtime_ns for path in work.glob("*.pt*")}


def test_nor_behind_a_newer_file_with_a_sidecar_of_today(
    settings: Settings, tmp_path: Path
) -> None:
    entrypoint.run(settings)
    path = tmp_path / "work" / "final.pt"
    payload = torch.load(path, weights_only=True)
    payload["meta"]["format_version"] = 2
    torch.save(payload, path)
    meta = json.loads(path.with_name("final.pt.meta.json").read_text())
    kept = {k: v for k, v in meta.items() if k not in ("file", "size", "crc32c")}
    described = Sidecar("final.pt", path.stat().st_size, crc32c_of(path), kept)
    path.with_name("final.pt.meta.json").write_bytes(described.dump())
    with pytest.raises(CheckpointError, match=NEWER):
        entrypoint.run(settings)


@pytest.mark.parametrize("version", ["1", True, -1, 1.0, None, 10**30], ids=repr)
def test_a_version_that_is_none_gets_one_line(tmp_path: Path, version: Any) -> None:
    message = "has a format_version that is not a whole number from 0 on"
    path = of_format(tmp_path / "x.pt", version, sidecar=False)
    with pytest.raises(CheckpointError, match=f"x.pt {message}"):
        read_checkpoint(path)
    data = json.dumps({"format_version": version}).encode()
    with pytest.raises(CheckpointError, match=f"sidecar of x.pt {message}"):
        Sidecar.parse(data, "x.pt")


def test_metadata_from_before_versions_is_brought_to_the_first(tmp_path: Path) -> None:
    """The fields are the same: nothing is made up."""
    assert current_form({"step": 3, "seed": 1}, "x.pt") == {
        "format_version": 1,
        "step": 3,
        "seed": 1,
    }
    assert current_form({"format_version": 0}, "x.pt") == {"format_version": 1}
    today = {"format_version": 1, "step": 3}
    assert current_form(today, "x.pt") == today
    torch.save(base_package_payload(trained=24, rows=32), tmp_path / "base.pt")
    assert read_checkpoint(tmp_path / "base.pt").meta == {}


def test_an_older_format_takes_every_step_to_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a later release would have it: one more version, one more function."""
    path = tmp_path / "best.pt"
    save_student(path)
    monkeypatch.setattr(metadata, "FORMAT_VERSION", 2)
    monkeypatch.setitem(
        metadata._UPGRADES,
        1,
        lambda meta: {**meta, "format_version": 2, "seeds": [meta.get("seed")]},
    )
    meta = read_checkpoint(path).meta
    assert (meta["format_version"], meta["seeds"]) == (2, [42])
    data = path.with_name("best.pt.meta.json").read_bytes()
    assert Sidecar.parse(data, "best.pt").meta["seeds"] == [42]
    assert current_form({"seed": 7}, "x.pt") == {"format_version": 2, "seed": 7, "seeds": [7]}
