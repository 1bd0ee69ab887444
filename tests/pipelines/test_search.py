"""A search in the kfp local runner: its ranking, what a repeat does, and a trial that is killed."""

from __future__ import annotations

import json
import re
import shlex
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.grid import Search, read_search
from pipelines.local import DEMO, LocalRun
from pipelines.local_runs import LOG
from pipelines.parameters import check_parameters, parse_parameters
from pipelines.search import TRIALS, search_here, search_stages, summary
from trainer.checkpoints.sidecar import read_sidecars
from trainer.storage.places import open_location

EXAMPLE = Path(__file__).parents[2] / "examples" / "search.yaml"
SMALL = """
settings:
  alpha_schedule: ["0:0.5,10:0.2"]
seeds: [1, 2]
train_steps: 20
max_trials: 4
"""

pytestmark = pytest.mark.timeout(900)


def written(directory: Path, text: str) -> str:
    path = directory / "grid.yaml"
    path.write_text(text)
    return str(path)


class Killer(threading.Thread):
    """Kills a trial once its first snapshot is whole, as a platform that takes its machine away."""

    def __init__(self, trials: Path) -> None:
        super().__init__(daemon=True)
        self.trials = trials

    def run(self) -> None:
        while not list(self.trials.glob("*/ckpt_step_*.pt.meta.json")):
            time.sleep(0.002)
        for child in psutil.Process().children(recursive=True):
            # Not what other tests have started, such as an object server
            if "executor_main" in " ".join(child.cmdline()):
                child.kill()


@dataclass
class Searched:
    search: Search
    work: Path
    run: LocalRun

    @property
    def outputs(self) -> dict[str, Any]:
        return self.run.outputs

    @property
    def ranking(self) -> dict[str, Any]:
        return dict(json.loads(Path(self.outputs["ranking"].path).read_text()))

    @property
    def told(self) -> str:
        return (self.run.directory / LOG).read_text()

    @property
    def ends(self) -> list[str]:
        """How its trials ended, without those from the cache."""
        pattern = r"'train-trial'\S* finished with status \S*?(SUCCESS|FAILURE)"
        return re.findall(pattern, self.told)


def searched_in(work: Path, search: Search) -> Searched:
    return Searched(search, work, search_here(work, search))


def searched_with_a_kill(work: Path, search: Search) -> Searched:
    Killer(work / TRIALS).start()
    return searched_in(work, search)


@pytest.fixture(scope="module")
def own() -> dict[str, Any]:
    return {"anneal_eval_every": 10, "anneal_save_every": 4, "target_workers": 1}


@pytest.fixture(scope="module")
def searched(
    parameters: dict[str, Any], own: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Searched:
    """A setting, its control, two seeds; the first trial is killed on its way."""
    work = tmp_path_factory.mktemp("search")
    search = read_search(written(work, SMALL), parameters | own, own)
    return searched_with_a_kill(work, search)


def check_ranking(searched: Searched) -> None:
    groups = searched.ranking["groups"]
    assert len(groups) == len(searched.search.settings)
    for group in groups:
        assert set(group["losses"]) == {"1", "2"}
        for seed, place in group["places"].items():
            of_end = [s for s in read_sidecars(open_location(place)) if s.name == "final.pt"]
            assert of_end[0].metrics["val_loss_student"] == group["losses"][seed]
            assert of_end[0].meta["seed"] == int(seed)
        low, high = sorted(group["losses"].values())
        assert group["mean"] == pytest.approx((low + high) / 2)
        assert group["spread"] == pytest.approx(high - low)
    means = [group["mean"] for group in groups]
    assert means == sorted(means)
    assert len({group["tokens"] for group in groups}) == 1


def test_trials_are_ranked_with_their_spread_over_seeds(searched: Searched) -> None:
    check_ranking(searched)
    assert sorted(group["settings"] for group in searched.ranking["groups"]) == [
        "CE only",
        "alpha_schedule=0:0.5,10:0.2",
    ]
    table = Path(searched.outputs["table"].path).read_text()
    assert table.count("\n| ") == 3
    assert "the spread over seeds is" in table
    assert "evaluated on 600 tokens" in table
    page = Path(searched.outputs["report"].path).read_text()
    assert "<!DOCTYPE html>" in page
    assert "4 runs compared" in page


def test_a_control_reads_no_targets(searched: Searched) -> None:
    (control,) = [group for group in searched.ranking["groups"] if group["control"]]
    for place in control["places"].values():
        assert "/ce-only_lr0.001_seed" in place
        (meta,) = [s.meta for s in read_sidecars(open_location(place)) if s.name == "final.pt"]
        assert (meta["kd_alpha"], meta["teacher_targets"]) == (0.0, None)


def test_a_killed_trial_goes_on_from_its_snapshots(searched: Searched) -> None:
    assert searched.ends.count("FAILURE") == 1
    assert searched.ends.count("SUCCESS") == 4
    starts = [int(step) for step in re.findall(r"training from step (\d+) to 20", searched.told)]
    assert len(starts) == 5
    assert [step > 0 for step in starts].count(True) == 1


def test_the_winner_is_given_as_parameters_of_the_whole_pipeline(
    searched: Searched, parameters: dict[str, Any], own: dict[str, Any]
) -> None:
    text = Path(searched.outputs["winner"].path).read_text()
    assert text == searched.ranking["groups"][0]["parameters"]
    for group in searched.ranking["groups"]:
        given = parse_parameters(group["parameters"])
        check_parameters(parameters | given)
        assert given.items() >= own.items()
        assert given["anneal_train_steps"] == 20
        if group["control"]:
            assert (given["anneal_alpha"], given["anneal_alpha_schedule"]) == (0.0, "")
        else:
            assert f"alpha_schedule={given['anneal_alpha_schedule']}" == group["settings"]
    # As a shell and make read what is printed
    assert shlex.split(f"PARAMS={shlex.quote(text)}") == [f"PARAMS={text}"]


def test_a_repeated_and_a_wider_search_train_what_is_new(
    searched: Searched, parameters: dict[str, Any], own: dict[str, Any], tmp_path: Path
) -> None:
    before = searched.ranking
    again = searched_in(searched.work, searched.search)
    assert (again.ends, again.run.ran) == ([], [])
    assert again.outputs["ranking"].path == searched.outputs["ranking"].path
    assert again.ranking == before
    wider = SMALL.replace('["0:0.5', '["0:0.9", "0:0.5').replace("[1, 2]", "[2]")
    search = read_search(written(tmp_path, wider), parameters | own, own)
    wide = searched_in(searched.work, search)
    assert wide.ends == ["SUCCESS"]
    assert len(wide.ranking["groups"]) == 3
    assert any("one seed tells nothing of the spread" in said for said in wide.ranking["said"])


@pytest.mark.soak
def test_rungs_let_the_better_part_go_on_from_its_snapshots(
    searched: Searched, parameters: dict[str, Any], own: dict[str, Any], tmp_path: Path
) -> None:
    text = SMALL.replace('["0:0.5', '["0:0.9", "0:0.5').replace("[1, 2]", "[3]")
    text = text.replace("train_steps: 20", "train_steps: 10\nrungs: [5]")
    climbed = searched_in(
        searched.work, read_search(written(tmp_path, text), parameters | own, own)
    )
    assert climbed.ends == ["SUCCESS"] * 3  # of the first rung
    starts = re.findall(r"training from step (\d+) to (\d+)", climbed.told)
    assert sorted(starts) == [("0", "5")] * 3 + [("5", "10")] * 2
    groups = climbed.ranking["groups"]
    assert [group["updates"] for group in groups] == [10, 10, 5]
    assert [group["control"] for group in groups].count(True) == 1
    assert not groups[2]["control"], "the control goes on"


def test_the_example_is_a_search_of_the_demonstration() -> None:
    search = read_search(str(EXAMPLE), DEMO, {})
    assert (len(search.settings), len(search.trials)) == (6, 12)
    assert summary(search).splitlines()[0] == (
        "12 trials: 4 settings and 2 of cross entropy alone, times 2 seeds; 80 updates each"
    )
    assert [stage.title for stage in search_stages(search).values()] == [
        *("prepare", "teacher-targets", "join-targets"),
        *("trials", "rank-trials"),
    ]


@pytest.mark.soak
def test_the_example_as_a_whole(
    parameters: dict[str, Any], own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six settings, two seeds; one trial is killed; repeated with and without the cache."""
    own = own | {"anneal_eval_every": 40}
    searched = searched_with_a_kill(tmp_path, read_search(str(EXAMPLE), parameters | own, own))
    check_ranking(searched)
    assert (searched.ends.count("FAILURE"), searched.ends.count("SUCCESS")) == (1, 12)
    assert searched_in(tmp_path, searched.search).ends == []
    monkeypatch.setenv("CACHE", "0")
    told = {path: path.stat().st_mtime_ns for path in tmp_path.glob(f"{TRIALS}/*/final.pt")}
    again = searched_in(tmp_path, searched.search)
    assert again.told.count("nothing to do") == 12
    assert {path: path.stat().st_mtime_ns for path in told} == told
    assert again.outputs["ranking"].path != searched.outputs["ranking"].path
    assert again.ranking == searched.ranking
