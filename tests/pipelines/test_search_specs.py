"""A search as the platforms get it: compiled for each, and what would be submitted."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines import search as command
from pipelines.compile import compile_to
from pipelines.grid import Search, read_search
from pipelines.search import arguments, build_search, search_stages
from pipelines.settings import load_settings
from pipelines.spec import tasks_of
from tests.pipelines.test_compile import custom_job, executors
from trainer.runtime.commands import run_command
from trainer.runtime.errors import UsageError
from trainer.search.trials import Trial

IMAGE = "europe-docker.pkg.dev/p/r/trainer@sha256:" + "0" * 64
MACHINES = {
    "TRAINER_IMAGE": IMAGE,
    "ANNEAL_ACCELERATOR_TYPE": "NVIDIA_L4",
    "ANNEAL_MACHINE_TYPE": "g2-standard-12",
    "ANNEAL_SCHEDULING": "spot",
    "ANNEAL_RETRIES": "7",
}
FOR_KUBEFLOW = ("TRAINER_IMAGE", "ANNEAL_ACCELERATOR_TYPE", "ANNEAL_RETRIES")
GRID = """
settings: {lr_peak: [1e-4, 2e-4], temp_schedule: ["", "0:1.5"]}
seeds: [1, 2]
rungs: [300, 600]
parallelism: 3
max_trials: 30
"""


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(GRID)
    return read_search(str(path), {}, {})


def compiled(path: Path, search: Search, backend: str) -> dict[str, Any]:
    names = FOR_KUBEFLOW if backend == "kfp" else tuple(MACHINES)
    settings = load_settings({name: MACHINES[name] for name in names})
    compile_to(path, settings, backend, partial(build_search, search))
    return dict(next(iter(yaml.safe_load_all(path.read_text()))))


@pytest.mark.parametrize("backend", ["vertex", "kfp", "local"])
def test_a_search_compiles_for_every_backend(backend: str, search: Search, tmp_path: Path) -> None:
    spec = compiled(tmp_path / "search.yaml", search, backend)
    parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert parsed.pipeline_info.name == "liquid-search"
    titles = [stage.title for stage in search_stages(search).values()]
    assert sorted(task.title for task in tasks_of(spec).values()) == sorted(titles)
    found = executors(spec)
    rungs = [name for name in found if name.startswith("trials")]
    assert len(rungs) == 3
    stops = []
    for name in rungs:
        executor = found[name]
        command_of = executor["command"]
        if backend == "vertex":
            job = custom_job(spec, executor)
            assert (job["strategy"], job["restart_job_on_worker_restart"]) == ("SPOT", True)
            (pool,) = job["worker_pool_specs"]
            assert pool["machine_spec"]["accelerator_type"] == "NVIDIA_L4"
            command_of = pool["container_spec"]["command"]
        if backend == "kfp":
            assert executor["resources"]["accelerator"]["resourceCount"] == "1"
        script = command_of[command_of.index("sh") + 2]
        assert re.search("^ *exec python3 -m kfp", script, re.MULTILINE)
        retries = executor["task"]["retryPolicy"]["maxRetryCount"]
        assert retries == (1 if backend == "local" else 7)
        inputs = executor["task"]["inputs"]["parameters"]
        stops.append(inputs["stop_at"]["runtimeValue"]["constant"])
    assert sorted(stops) == [0, 300, 600]


@pytest.mark.parametrize(("backend", "expected"), [("vertex", 3), ("kfp", 3), ("local", 1)])
def test_as_many_trials_at_a_time_as_the_grid_says(
    backend: str, expected: int, search: Search, tmp_path: Path
) -> None:
    spec = compiled(tmp_path / "search.yaml", search, backend)
    loops = {
        task["taskInfo"]["name"]: task.get("iteratorPolicy", {}).get("parallelismLimit", 0)
        for task in spec["root"]["dag"]["tasks"].values()
        if "parameterIterator" in task
    }
    at_a_time = {name: limit for name, limit in loops.items() if name != "shares"}
    assert list(at_a_time.values()) == [expected] * 3
    assert loops["shares"] == (1 if backend == "local" else 0)


def test_without_distillation_there_is_no_teacher(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("settings: {alpha: [0], lr_peak: [1e-4, 2e-4]}")
    search = read_search(str(tmp_path / "grid.yaml"), {}, {})
    spec = compiled(tmp_path / "search.yaml", search, "vertex")
    assert [task.title for task in tasks_of(spec).values()] == ["prepare", "trials", "rank-trials"]


def test_a_trial_runs_on_one_machine(search: Search) -> None:
    with pytest.raises(UsageError, match="ANNEAL_REPLICAS=2: a trial runs on one machine"):
        build_search(search, load_settings({"ANNEAL_REPLICAS": "2"}), "vertex")


def test_a_wider_grid_keeps_the_texts_of_the_trials_it_had(search: Search, tmp_path: Path) -> None:
    """The cache and the locations of trials go by them."""
    path = tmp_path / "grid.yaml"
    path.write_text(GRID.replace("1e-4,", "1e-4, 1.5e-4,").replace("[1, 2]", "[2, 3, 1]"))
    wider = read_search(str(path), {}, {})
    one, other = (arguments(each, "gs://bucket/trials") for each in (search, wider))
    assert set(one["trials"]) < set(other["trials"])
    assert one["shares"] == other["shares"]
    assert one["common"] == other["common"]
    assert [json.loads(share)["worker"] for share in one["shares"]] == [0, 1, 2, 3]
    assert all(Trial.parse(text).dump() == text for text in one["trials"])


@pytest.mark.parametrize("backend", ["vertex", "kfp"])
def test_a_dry_run_prints_what_would_be_sent(
    backend: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "none.yaml").write_text("")
    given = {
        "GRID": str(tmp_path / "grid.yaml"),
        "SETTINGS": str(tmp_path / "none.yaml"),
        "PARAMS": "anneal_warmup_steps=100 resume_gcs_uri=gs://bucket/base.pt",
        "PIPELINE_ROOT": "gs://bucket/runs/",
        "TRAINER_IMAGE": IMAGE,
        "DRY_RUN": "1",
        "JSON": "1",
        **({"PROJECT": "p"} if backend == "vertex" else {"HOST": "http://localhost:1"}),
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run_command(command.main, [backend]) == 0
    printed = capsys.readouterr().out
    if backend == "vertex":
        request = json.loads(printed)
        assert request["pipelineJobId"].startswith("liquid-search-")
        values = request["pipelineJob"]["runtimeConfig"]["parameterValues"]
    else:
        values = json.loads(printed.partition("---")[0])["arguments"]
    assert values["trials_uri"] == "gs://bucket/runs/search-trials"
    assert len(values["trials"]) == 2 * (4 + 2)
    assert values["common"]["warmup_steps"] == 100
    assert values["common"]["resume_gcs_uri"] == "gs://bucket/base.pt"
    (winning, *_) = values["parameters"].values()
    assert winning.startswith("anneal_warmup_steps=100 resume_gcs_uri=gs://bucket/base.pt ")
    monkeypatch.setenv("JSON", "0")
    assert run_command(command.main, [backend]) == 0
    told = capsys.readouterr().out
    assert told.startswith("12 trials: 4 settings and 2 of cross entropy alone, times 2 seeds")
    assert re.search(r"^a trial takes \d+ min .*; all 12 to their end take ", told, re.MULTILINE)
    assert ("USD" in told) == (backend == "vertex")
    monkeypatch.setenv("PIPELINE_ROOT", "")
    assert run_command(command.main, [backend]) == 2
    assert "missing: PIPELINE_ROOT" in capsys.readouterr().err
