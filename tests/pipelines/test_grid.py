"""The grid of a search: what it tries, and what is found wrong with it before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import search as command
from pipelines.grid import Search, read_search
from pipelines.local import DEMO
from trainer.runtime.commands import run_command
from trainer.runtime.errors import UsageError


def of(tmp_path: Path, text: str, own: dict[str, Any] | None = None) -> Search:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return read_search(str(path), DEMO | (own or {}), own or {})


def tried(search: Search, *names: str) -> list[tuple[Any, ...]]:
    """The values of settings of the trials that are no controls."""
    return [
        tuple(one.get(name) for name in names) for one in search.settings if one.get("alpha") != 0.0
    ]


def test_every_combination_is_tried_beside_a_control_of_each_other_setting(tmp_path: Path) -> None:
    search = of(
        tmp_path,
        """
        settings:
          alpha_schedule: ["0:1.0", "0:0.7,40:0.5"]
          T: [1.0, 1.5]
          lr_peak: {from: 1e-4, to: 4e-4, count: 3, scale: log}
        seeds: [7, 9]
        max_trials: 30
        """,
    )
    found = tried(search, "alpha_schedule", "T", "lr_peak")
    assert found == [
        (alpha, temperature, rate)
        for alpha in ("0:1.0", "0:0.7,40:0.5")
        for temperature in (1.0, 1.5)
        for rate in (1e-4, 2e-4, 4e-4)
    ]
    controls = [one for one in search.settings if one.get("alpha") == 0.0]
    assert [one["lr_peak"] for one in controls] == [1e-4, 2e-4, 4e-4]
    assert len(search.trials) == 2 * (12 + 3)
    assert {trial.seed for trial in search.trials} == {7, 9}
    # A constant temperature ends the demonstration's schedule of it
    assert all(one["temp_schedule"] is None for one in search.settings)
    assert [json.loads(share)["target_temperatures"] for share in search.shares] == [[1.0, 1.5]]


def test_ranges_samples_and_listed_trials(tmp_path: Path) -> None:
    linear = "settings: {warmup_steps: {from: 10, to: 30, count: 3}, dropout: 0.1}"
    assert tried(of(tmp_path, linear), "warmup_steps") == [(10,), (20,), (30,)]
    many = """
    settings: {lr_peak: {from: 1e-5, to: 1e-2, count: 100}, dropout: {from: 0, to: 0.9, count: 100}}
    sample: 3
    """
    some = tried(of(tmp_path, many), "lr_peak", "dropout")
    assert len(set(some)) == 3
    assert tried(of(tmp_path, many), "lr_peak", "dropout") == some
    listed = "trials: [{lr_peak: 1e-3}, {lr_peak: 2e-3, dropout: 0.1}]"
    search = of(tmp_path, listed, {"seed": 5})
    assert tried(search, "lr_peak", "dropout") == [(1e-3, None), (2e-3, 0.1)]
    assert {trial.seed for trial in search.trials} == {5}


def test_trials_without_distillation_are_controls(tmp_path: Path) -> None:
    search = of(tmp_path, "settings: {alpha: [0, 0.5], T: [1, 2], lr_peak: [1e-3]}")
    assert tried(search, "alpha", "T") == [(0.5, 1.0), (0.5, 2.0)]
    assert len(search.settings) == 3
    search = of(tmp_path, "settings: {alpha: [0], lr_peak: [1e-3, 2e-3]}")
    assert not search.needs_targets
    assert len(search.settings) == 2


def test_a_control_is_trained_once_however_its_settings_are_written(tmp_path: Path) -> None:
    """Two of the same location would be trained side by side, each in the other's way."""
    search = of(tmp_path, "trials: [{alpha: 0.5}, {alpha: 0.6, lr_peak: 3e-3}]")
    assert sum(one["alpha"] == 0.0 for one in search.settings) == 1


def test_parameters_of_a_group_carry_further_settings(tmp_path: Path) -> None:
    search = of(tmp_path, "settings: {dropout: [0.1], global_batch: [16]}", {"seed": 3})
    first = search.parameters[search.trials[0].group]
    assert first.startswith("seed=3 anneal_train_steps=240 anneal_grad_accum=0 ")
    assert '"dropout": 0.1, "global_batch": 16' in first
    assert '"d_model": 96' in first, "what the demonstration gives there is kept"


RANGE = "settings: {lr_peak: {%s}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: {lr_peek: [1e-3]}", "unknown setting 'lr_peek'; did you mean 'lr_peak'?"),
        ("setings: {lr_peak: [1e-3]}", "unknown key 'setings'; did you mean settings?"),
        ("lr_peak: [1e-3]", "unknown key 'lr_peak'; settings to try stand below 'settings:'"),
        ("settings: {lr_peak: []}", "lr_peak has an empty list; give values to try"),
        ("settings:", "settings: names with values to try are needed"),
        ("seeds: [1]", "there is nothing to try"),
        (RANGE % "from: 1e-4, count: 3", "the range of lr_peak has no 'to'; write {from: 1e-4"),
        (RANGE % "from: 1e-4, to: x, count: 3", "lr_peak: to: 'x' is no number"),
        (RANGE % "from: 1e-4, to: 1e-3, count: 1", "needs two ends and a count of 2 or more"),
        (RANGE % "from: 0, to: 1, count: 2, scale: log", "so its ends are above 0"),
        (RANGE % "from: 1, to: 2, count: 2, scale: cube", "'cube'; choose linear or log"),
        (RANGE % "from: 1, to: 2, step: 1", "the range of lr_peak has 'step'; write"),
        ("settings: {lr_peak: [1e-3, 0.001]}", "lr_peak has 0.001 twice; keep one of them"),
        ("settings: {lr_peak: [-1]}", "trial lr_peak=-1.0: --lr_peak=-1 must be above 0"),
        ("settings: {lr_peak: [x]}", "--lr_peak='x': a number is needed"),
        (
            "settings: {alpha_schedule: ['0:0.7,x:1']}",
            "trial alpha_schedule=0:0.7,x:1: --alpha_schedule='0:0.7,x:1': entry 2",
        ),
        ("settings: {seed: [1, 2]}", "seed is not for a grid: give seeds beside settings"),
        ("settings: {block_size: [64]}", "losses at different contexts cannot be compared"),
        ("settings: {save_every: [64]}", "save_every is not for a grid: it does not change what"),
        ("settings: {kd_scheme: [reverse_kl]}", "needs the teacher itself"),
        ("settings: {dropout: [0.1]}\nseeds: [1, x]", "seeds: 'x' is no whole number"),
        ("settings: {dropout: [0.1]}\nseeds: [1.5]", "seeds: '1.5' is no whole number"),
        ("settings: {dropout: [0.1]}\nseeds: [1, 1]", "seeds: [1, 1] holds a number twice"),
        ("settings: {dropout: [0.1]}\nseeds: 1", "seeds: a list of whole numbers is needed"),
        ("settings: {dropout: [0.1]}\nseeds: []", "seeds: a list of whole numbers is needed"),
        (
            "settings: {dropout: [0.1, 0.2]}\nseeds: [1, 2, 3]\nmax_trials: 5",
            "12 trials (4 settings, 2 of them controls, times 3 seeds) are more than max_trials: 5",
        ),
        (
            "settings: {dropout: {from: 0, to: 0.9, count: 1000}}",
            "1000 combinations are more than max_trials: 24",
        ),
        ("settings: {dropout: [0.1]}\nmax_trials: 0", "max_trials: 0 must be at least 1"),
        ("settings: {dropout: [0.1]}\nkeep: 1", "keep: 1 must be above 0 and below 1"),
        ("settings: {dropout: [0.1]}\nrungs: [300]", "rungs: 300 is past the 240 updates"),
        ("settings: {dropout: [0.1]}\nrungs: [20, 10]", "rungs: [20, 10] must be updates that"),
        (
            "settings: {dropout: [0.1]}\ntrials: [{dropout: 0.1}]",
            "trial dropout=0.1 trains the same as dropout=0.1; keep one of them",
        ),
        (
            "trials: [{dropout: 0.1}, {dropout: 0.1, lr_peak: 3e-3}]",
            "trial dropout=0.1 lr_peak=0.003 trains the same as dropout=0.1; keep one of them",
        ),
        (
            "trials: [{alpha: 0.5}, {alpha_schedule: '0:0.50,9:0.5,240:0.1'}]",
            "trial alpha_schedule=0:0.50,9:0.5,240:0.1 trains the same as alpha=0.5",
        ),
        (
            "settings: {alpha_schedule: ['0:1.0'], alpha: [0.5, 0.6]}",
            "trains the same as alpha_schedule=0:1.0 alpha=0.5",
        ),
        ("trials: [0.1]", "trials: number 1 is '0.1', not settings with values"),
        (
            "trials: [{global_batch: 16}, {global_batch: 32}]",
            "trial global_batch=32 trains on 491520 tokens, the first one on 245760;",
        ),
        ("settings: {dropout: [0.1]}\nparallelism: 0", "parallelism: 0 must be at least 1"),
    ],
)
def test_a_wrong_grid_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        of(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("GRID=")


def test_equal_tokens_are_compared_whatever_they_are_made_of(tmp_path: Path) -> None:
    text = "trials: [{global_batch: 16}, {global_batch: 32, train_steps: 120}]"
    assert len(of(tmp_path, text).settings) == 4
    with pytest.raises(UsageError, match="trains on 2048 tokens an update, where rungs"):
        of(tmp_path, f"{text}\nrungs: [60]")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GRID": ""}, "missing: GRID"),
        ({"GRID": "absent.yaml"}, "GRID=absent.yaml cannot be read: No such file or directory"),
        (
            {"PARAMS": "anneal_lr_peak=0"},
            "PARAMS for stage anneal: anneal_lr_peak=0 must be above 0",
        ),
    ],
)
def test_the_command_ends_with_2_and_makes_nothing(
    environment: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text("settings: {dropout: [0.1]}")
    monkeypatch.setenv("GRID", "grid.yaml")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for backend in ("local", "vertex", "kfp"):
        assert run_command(command.main, [backend]) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]
