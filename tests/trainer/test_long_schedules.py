"""What a run writes it can read: schedules with an entry for every update, and the limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer import entrypoint, evaluate, export_hf, pick_best, resize_reset
from trainer.checkpoints.reading import read_checkpoint
from trainer.checkpoints.sidecar import SIDECAR_LIMIT, WRITTEN_LIMIT
from trainer.runtime.errors import UsageError
from trainer.settings.layers import resolve
from trainer.settings.schedules import SCHEDULE_LIMIT

Settings = dict[str, Any]


def long_schedule(entries: int, low: float) -> str:
    return ",".join(f"{step}:{low + step / 3e5!r}" for step in range(entries))


@pytest.mark.parametrize("entries", [4_000, 16_000])
def test_an_entry_for_every_update_is_saved_and_read_by_every_command(
    settings: Settings, tmp_path: Path, entries: int
) -> None:
    schedules = {
        "alpha_schedule": long_schedule(entries, 0.3),
        "temp_schedule": long_schedule(entries, 1.1),
    }
    assert max(map(len, schedules.values())) < SCHEDULE_LIMIT
    settings |= schedules | {"train_steps": 4, "save_every": 2, "eval_every": 2}
    first = entrypoint.run(settings)
    lines = list(resolve(settings, {}).lines())
    assert max(map(len, lines)) < 1100, "the log shows where they begin"
    work = tmp_path / "work"
    sidecar = work / "final.pt.meta.json"
    assert sidecar.stat().st_size < SIDECAR_LIMIT
    # It goes on: the last checkpoint is gone, and the one before it is read
    for name in ("final.pt", "ckpt_step_4.pt", "best.pt", "ckpt_best_step4"):
        for path in work.glob(f"{name}*"):
            path.unlink()
    again = entrypoint.run(settings)
    assert first is not None
    assert again is not None
    assert again.metrics == first.metrics
    final = str(work / "final.pt")
    for name, text in schedules.items():
        assert read_checkpoint(Path(final)).meta[name] == text
    picked = pick_best.run([str(work)], "val_loss_student")
    assert picked.meta["alpha_schedule"] == schedules["alpha_schedule"]
    # Another phase that takes the schedules over, a resized student, the exported, the evaluated
    phase = {key: value for key, value in settings.items() if key not in schedules}
    phase |= {"resume_gcs_uri": final, "local_workdir": str(tmp_path / "next"), "train_steps": 6}
    entrypoint.run(phase)
    taken_over = read_checkpoint(tmp_path / "next" / "final.pt").meta["settings"]
    assert schedules.items() <= taken_over.items()
    resize_reset.run(final, str(tmp_path / "r.pt"), 64, workdir=str(tmp_path / "w"))
    assert read_checkpoint(tmp_path / "r.pt").meta["origin"]["step"] == 4
    export_hf.run(final, str(tmp_path / "exported"), workdir=str(tmp_path / "w"))
    plain = {key: value for key, value in settings.items() if key not in schedules}
    config = resolve(plain | {"eval_ctx_lens": (32,)}, {}).config
    assert evaluate.run(config, [final], str(tmp_path / "metrics"))[0].step == 4


def test_what_could_not_be_read_again_is_refused_before_the_training(
    settings: Settings, tmp_path: Path
) -> None:
    """However it comes to be that large; nothing is written."""
    cases: dict[str, tuple[Settings, str]] = {
        "schedule": (
            {"alpha_schedule": "0:0.5," + "9" * SCHEDULE_LIMIT},
            f"--alpha_schedule='0:0.5,9999.* has {SCHEDULE_LIMIT + 6} characters",
        ),
        "one text": ({"dataset_revision": "x" * (2 << 20)}, "is larger than any run's"),
        "all": (
            {"eval_ctx_lens": tuple(range(1, 40_000))},
            rf"the metadata of final.pt takes \d+ bytes; at most {WRITTEN_LIMIT - (1 << 20)} are",
        ),
        "no Unicode": ({"dataset_revision": "a\udcff"}, "which is not Unicode"),
    }
    for name, (changed, message) in cases.items():
        with pytest.raises(UsageError, match=message) as caught:
            entrypoint.run(settings | changed)
        assert len(str(caught.value)) < 500, name
        assert not list((tmp_path / "work").glob("*.pt*"))
