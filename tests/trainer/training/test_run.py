"""How often a run's settings are looked at: once each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from trainer import entrypoint
from trainer.checkpoints.reading import read_checkpoint
from trainer.runtime.errors import LiquidError, UsageError
from trainer.settings import dates, layers, schedules
from trainer.settings.config import TrainConfig
from trainer.training import run

Settings = dict[str, Any]


class Counts:
    """Configurations built, and schedules parsed by their texts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.configs: list[TrainConfig] = []
        self.entries: list[str] = []
        self.dates: list[str] = []
        schedules.schedule_entries.cache_clear()
        check, parse, expand = TrainConfig.__post_init__, schedules._parse_entry, dates.expand_dates

        def built(config: TrainConfig) -> None:
            self.configs.append(config)
            check(config)

        def parsed(piece: str, *rest: Any) -> tuple[int, float]:
            self.entries.append(piece)
            return parse(piece, *rest)

        def expanded(text: str, **options: Any) -> str:
            self.dates += [text] * ("$(" in text)
            return expand(text, **options)

        monkeypatch.setattr(TrainConfig, "__post_init__", built)
        monkeypatch.setattr(schedules, "_parse_entry", parsed)
        monkeypatch.setattr(layers, "expand_dates", expanded)


@pytest.fixture
def source(settings: Settings, tmp_path: Path) -> str:
    """A checkpoint of a first phase with schedules."""
    annealed = {"alpha_schedule": "0:0.7,2:0.4", "temp_schedule": "0:2.0,3:1.5"}
    entrypoint.run(
        settings | annealed | {"local_workdir": str(tmp_path / "first"), "train_steps": 4}
    )
    return str(tmp_path / "first" / "final.pt")


def test_a_second_phase_builds_one_configuration_and_parses_each_schedule_once(
    settings: Settings, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the schedules of the phase behind are dropped and the batch size is derived."""
    del settings["micro_batch"], settings["global_batch"]
    place = {"output_gcs_uri": str(tmp_path / "out-$(date +%Y)")}
    phase = settings | place | {"resume_gcs_uri": source, "alpha_schedule": "0:0.3,1:0.2"}
    counts = Counts(monkeypatch)
    entrypoint.run(phase | {"train_steps": 2})
    assert len(counts.configs) == 1
    assert sorted(counts.entries) == ["0:0.3", "0:0.7", "0:2.0", "1:0.2", "2:0.4", "3:1.5"]
    assert counts.dates == [place["output_gcs_uri"]]
    (output,) = tmp_path.glob("out-2*")
    meta = read_checkpoint(output / "final.pt").meta
    assert (meta["alpha_schedule"], meta["temp_schedule"]) == ("0:0.3,1:0.2", "")
    assert (meta["kd_alpha"], meta["kd_temperature"], meta["global_batch"]) == (0.2, 1.5, 4)


def test_a_run_that_goes_on_builds_one_configuration(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    entrypoint.run(settings)
    counts = Counts(monkeypatch)
    assert entrypoint.run(settings) is not None
    assert len(counts.configs) == 1


def test_an_automatic_micro_batch_makes_one_more(
    settings: Settings, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts(monkeypatch)
    phase = settings | {"resume_gcs_uri": source, "micro_batch": 0, "global_batch": 12}
    entrypoint.run(phase | {"train_steps": 1})
    assert [config.micro_batch for config in counts.configs] == [0, 6]
    assert sorted(counts.entries) == ["0:0.7", "0:2.0", "2:0.4", "3:1.5"]


def test_the_process_that_starts_torchrun_builds_none_before_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counts(monkeypatch)

    def launch(*_: Any) -> bool:
        assert not counts.configs
        raise LiquidError("launched")

    monkeypatch.setattr(run, "launch_if_needed", launch)
    with pytest.raises(LiquidError, match="launched"):
        entrypoint.run_on_all_gpus(settings)
    argv = [f"--{name}={value}" for name, value in settings.items()]
    with pytest.raises(LiquidError, match="launched"):
        entrypoint.main(argv)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.5}, "--alpha=1.5 must be between 0 and 1"),
        ({"temp_schedule": "0:1,x:2"}, "--temp_schedule='0:1,x:2': entry 2"),
        ({"save_every": 0}, "--save_every=0 must be at least 1 updates"),
        ({"fp16": True, "bf16": True}, "--fp16 and --bf16 exclude each other"),
        ({"teacher_name": None}, "missing: --teacher_name"),
    ],
    ids=str,
)
def test_wrong_settings_are_told_before_the_checkpoint_is_fetched(
    settings: Settings, wrong: Settings, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: Any) -> Any:
        raise AssertionError("the checkpoint was fetched")

    monkeypatch.setattr(run, "read_from", fetch)
    with pytest.raises(UsageError) as caught:
        entrypoint.run(settings | {"resume_gcs_uri": "gs://bucket/far.pt"} | wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize("form", ["text", "json"])
def test_which_settings_a_start_shows(
    settings: Settings, form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a terminal those that are not as usual, and where the others are; all where they go on."""
    monkeypatch.setenv("LOG_FORMAT", form)
    caplog.set_level(logging.INFO)
    entrypoint.run(settings | {"train_steps": 1, "eval_every": 1, "weight_decay": 0.1})
    assert "d_model = 32 (command line)" in caplog.messages
    shown = [line for line in caplog.messages if line.endswith("(default)")]
    (rest,) = [line for line in caplog.messages if "have their defaults" in line] or [""]
    assert bool(rest) == (form == "text")
    assert bool(shown) == (form == "json")
    (last,) = [line for line in caplog.messages if line.startswith("step 1/1: ")]
    assert not last.endswith("left")
    assert any(line.startswith("finished at step 1 after ") for line in caplog.messages)


def test_the_log_tells_the_sources_of_places_and_of_what_follows(
    settings: Settings, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    del settings["micro_batch"], settings["global_batch"]
    place = {"output_gcs_uri": str(tmp_path / "out-$(date +%Y)")}
    dry = settings | {"resume_gcs_uri": source, "train_steps": 0}
    entrypoint.run(dry, place)
    (line,) = [line for line in caplog.messages if line.startswith("output_gcs_uri = ")]
    assert "$(" not in line
    assert line.endswith("(--config)")
    assert f"local_workdir = {settings['local_workdir']!r} (command line)" in caplog.messages
    assert "micro_batch = 4 (derived)" in caplog.messages
    assert "global_batch = 4 (checkpoint)" in caplog.messages
