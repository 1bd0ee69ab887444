"""Runs against each other: equal tokens, groups of seeds, what the spread allows to say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.reports.pages import Page, check_self_contained
from tests.trainer.reports.records import student_loss, write_run
from trainer import compare
from trainer.reports.comparison import short_names
from trainer.runtime.commands import run_command

TEACHER = {64: 3.05, 128: 2.99}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three learning rates with two seeds each; the first two are closer than their seeds."""
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(
            root / f"lr{number}-seed{seed}" / "checkpoints",
            teacher=TEACHER,
            floor=floor + 0.005 * seed,
            settings={"lr_peak": lr, "seed": seed, "output_gcs_uri": f"{number}{seed}"},
            steps=240 if seed == 1 else 200,
        )
        for number, (lr, floor) in enumerate(((1e-3, 3.0), (3e-3, 3.004), (1e-2, 3.3)))
        for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    output = tmp_path_factory.mktemp("compared")
    compare.run([str(run) for run in runs], str(output))
    return Page((output / compare.HTML).read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(page: Page) -> None:
    check_self_contained(page)
    assert len(page.all("svg")) == 2 + 3
    assert "hf_secretsecret" not in page.html


def test_settings_in_which_the_runs_differ(page: Page) -> None:
    """Not their places, and no secret."""
    rows = page.tables["Settings in which the runs differ"]
    assert rows[0] == ["", "run", "seed", "lr_peak"]
    assert rows[1] == ["1", "lr0-seed1", "1", "0.001"]
    assert rows[6] == ["6", "lr2-seed2", "2", "0.01"]


def test_losses_at_equal_tokens(page: Page, runs: list[Path]) -> None:
    """The shorter run ends at 200 updates; 50, 100 and 150 lie between or at evaluations."""
    rows = page.tables["Validation loss at context 64 in nats, at equal tokens"]
    assert rows[0][2:6] == ["at 51.2 k", "at 102 k", "at 154 k", "at 205 k"]

    def loss(step: int) -> float:
        return student_loss(step * 16 * 64, 64, floor=3.005)

    between = [
        loss(40) * 0.75 + loss(80) * 0.25,
        loss(80) * 0.5 + loss(120) * 0.5,
        loss(120) * 0.25 + loss(160) * 0.75,
    ]
    shown = [*between, loss(200), loss(240)]
    assert rows[1][2:7] == [f"{value:.4f}" for value in shown]
    assert rows[1][9] == "16,384"


def test_differences_are_measured_by_the_spread_over_seeds(page: Page) -> None:
    rows = page.tables["Groups of runs that differ in the seed alone, context 64"][1:]
    assert [row[:2] for row in rows] == [
        ["lr_peak=0.001", "2"],
        ["lr_peak=0.003", "2"],
        ["lr_peak=0.01", "2"],
    ]
    assert {row[5] for row in rows} == {"0.0050"}
    assert rows[0][6] == "the best"
    assert rows[1][6].startswith("+0.0040 nats, within the spread over seeds of 0.0050")
    assert rows[2][6] == "+0.3000 nats, more than the spread over seeds of 0.0050"


def test_the_tables_are_printed(
    runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compare.main([str(run) for run in runs[::2]])
    printed = capsys.readouterr().out
    assert "one seed each, so the spread over seeds is not known" in printed
    assert f"{student_loss(240 * 16 * 64, 64, floor=3.005):.4f}" in printed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"context": 256, "contexts": (256,)}, "No two runs were evaluated at the same context"),
        ({"ended": False}, "b has not ended."),
        ({"eval_tokens": 999}, "different numbers of tokens (16,384, 999)"),
        ({"steps": 0, "ended": False}, "No two runs were evaluated at the same context"),
    ],
    ids=str,
)
def test_runs_that_are_hard_to_compare(
    tmp_path: Path, options: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **options)]
    compare.main([*map(str, runs), f"--output={tmp_path}"])
    assert told in capsys.readouterr().out
    page = Page((tmp_path / compare.HTML).read_text(encoding="utf-8"))
    assert told in page.text
    check_self_contained(page)


def groups(runs: list[Path]) -> dict[str, list[str]]:
    """Rows of the groups at context 64 by group, as they are printed."""
    printed = compare.run([str(run) for run in runs])
    table = printed.partition("seed alone, context 64\n")[2].partition("\nLosses in nats")[0]
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_repeated_runs_tell_nothing_of_the_spread_over_seeds(tmp_path: Path) -> None:
    """The same run twice, or one more with its seed, is no second seed."""
    run, again = (write_run(tmp_path / name, settings={"seed": 1}) for name in "ab")
    other = write_run(tmp_path / "c", settings={"seed": 1, "lr_peak": 1.0}, floor=3.001)
    for runs in ([run, run, other], [run, again, other]):
        found = groups(runs)
        assert found["lr_peak=–"][0] == "1"
        assert "the spread over seeds is not known" in found["lr_peak=1.0"][-1]


def test_a_seed_that_diverged_does_not_make_its_group_the_best(tmp_path: Path) -> None:
    lost = {step: {"val_loss_student@64": math.nan} for step in range(120, 241)}
    runs = [
        write_run(
            tmp_path / f"{lr}-{seed}",
            settings={"seed": seed, "lr_peak": lr},
            floor=floor,
            changed=lost if (lr, seed) == (2.0, 2) else None,
        )
        for lr, floor in ((1.0, 3.1), (2.0, 3.0))
        for seed in (1, 2)
    ]
    found = groups(runs)
    assert found["lr_peak=1.0"][-1] == "the best"
    assert found["lr_peak=2.0"][0] == "1 of 2"
    told = "At context 64 2.0-2 has no finite loss at 246 k tokens"
    assert told in compare.run([str(run) for run in runs])


def test_schedules_that_differ_far_behind_are_no_seeds(tmp_path: Path) -> None:
    """What is shown of them is their beginning."""
    begin = ",".join(f"{step}:0.5" for step in range(100))
    runs = [
        write_run(
            tmp_path / str(seed),
            settings={"seed": seed, "alpha_schedule": f"{begin},100:0.{seed}"},
            floor=3.0 + seed,
        )
        for seed in (1, 2)
    ]
    assert {row[0] for row in groups(runs).values()} == {"1"}
    assert "alpha_schedule" in compare.run([str(run) for run in runs])


def test_losses_of_different_tokenizers_are_not_ranked(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"{name}{seed}",
            settings={"seed": seed},
            header={"tokens": {"fingerprint": name, "tokenizer_fingerprint": name}},
        )
        for name in "ab"
        for seed in (1, 2)
    ]
    assert {row[-1] for row in groups(runs).values()} == {"–"}
    assert "different tokenizers: their losses are per token of each, and cannot" in compare.run(
        [str(run) for run in runs]
    )


def test_seeds_that_began_at_different_checkpoints_are_told(tmp_path: Path) -> None:
    phase = {"step": 0, "context": 64, "stretched": False}
    runs = [
        write_run(
            tmp_path / str(seed),
            settings={"seed": seed},
            header={"phase": phase | {"checkpoint": f"start-{seed}.pt"}},
        )
        for seed in (1, 2)
    ]
    assert "began at different checkpoints" in compare.run([str(run) for run in runs])


def test_many_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=40)
    compare.run([str(run)] * 30, str(tmp_path))
    check_self_contained(Page((tmp_path / compare.HTML).read_text(encoding="utf-8")))


def test_one_run_is_not_compared(
    runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_command(compare.main, [str(runs[0]), f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert "give two or more to compare them" in json.loads(error)["message"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("locations", "names"),
    [
        (["/x/a/checkpoints", "/x/b/checkpoints"], ["a", "b"]),
        (["gs://b/r/1", "gs://b/r/2/"], ["1", "2"]),
        (["/x/a", "/x/a/b"], ["/x/a", "b"]),
        (["same", "same"], ["same", "same"]),
    ],
    ids=str,
)
def test_short_names(locations: list[str], names: list[str]) -> None:
    assert short_names(locations) == names
