"""The compiled YAML: what it asks for, and what it must not hold."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines.compile import compile_to, main
from pipelines.describe import DOCUMENT, up_to_date
from pipelines.parameters import parameter_defaults
from pipelines.settings import load_settings
from pipelines.spec import tasks_of
from pipelines.stages import STAGES
from trainer.runtime.errors import LiquidError, UsageError

IMAGE = "europe-docker.pkg.dev/p/r/trainer@sha256:" + "0" * 64
MACHINES = {
    "TRAINER_IMAGE": IMAGE,
    "ANNEAL_ACCELERATOR_TYPE": "NVIDIA_H100_80GB",
    "ANNEAL_ACCELERATOR_COUNT": "2",
    "ANNEAL_MACHINE_TYPE": "a3-highgpu-2g",
    "ANNEAL_SCHEDULING": "spot",
    "ANNEAL_TIMEOUT_HOURS": "30",
    "CONTINUE_REPLICAS": "3",
    "PREPARE_RETRIES": "5",
    "SERVICE_ACCOUNT": "robot@p.iam.gserviceaccount.com",
    "LABELS": "team=small-models",
}


GPU_STAGES = ("teacher-targets", "anneal", "continue", "evaluate", "lm-eval")


@pytest.fixture(scope="module", params=["vertex", "kfp", "local"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], str]:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    google = ("ANNEAL_SCHEDULING", "CONTINUE_REPLICAS", "SERVICE_ACCOUNT", "LABELS")
    google += ("ANNEAL_MACHINE_TYPE", "ANNEAL_TIMEOUT_HOURS")
    vertex_only = google if request.param == "kfp" else ()
    machines = {name: value for name, value in MACHINES.items() if name not in vertex_only}
    compile_to(path, load_settings(machines), request.param)
    text = path.read_text()
    return request.param, next(iter(yaml.safe_load_all(text))), text


def test_the_released_pipeline_spec_parses_it(compiled: tuple[str, dict[str, Any], str]) -> None:
    spec = json_format.ParseDict(compiled[1], pipeline_spec_pb2.PipelineSpec())
    assert spec.pipeline_info.name == "liquid-annealing"
    assert spec.root.dag.tasks
    names = {task["taskInfo"]["name"] for task in every_task(compiled[1]).values()}
    assert names == {stage.title for stage in STAGES.values() if not stage.setting}


def every_task(spec: dict[str, Any]) -> dict[str, Any]:
    """By key: the tasks that run a component."""
    dags = [part["dag"] for part in (spec["root"], *spec["components"].values()) if "dag" in part]
    return {
        key: task
        for dag in dags
        for key, task in dag["tasks"].items()
        if "dag" not in spec["components"][task["componentRef"]["name"]]
    }


def executors(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By task name: its container; those inside conditions and loops too."""
    found = {}
    for name, task in every_task(spec).items():
        component = spec["components"][task["componentRef"]["name"]]
        executor = spec["deploymentSpec"]["executors"][component["executorLabel"]]
        found[task["taskInfo"]["name"]] = {"task": task, "key": name, **executor["container"]}
    return found


def custom_job(spec: dict[str, Any], executor: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a custom training job, constants and defaults."""
    component = spec["components"][executor["task"]["componentRef"]["name"]]
    inputs = component["inputDefinitions"]["parameters"]
    values = {name: entry.get("defaultValue") for name, entry in inputs.items()}
    given = executor["task"]["inputs"]["parameters"]
    return values | {
        name: entry["runtimeValue"]["constant"]
        for name, entry in given.items()
        if "runtimeValue" in entry
    }


def test_gpus_only_where_they_were_asked_for(compiled: tuple[str, dict[str, Any], str]) -> None:
    backend, spec, _ = compiled
    for name, executor in executors(spec).items():
        gpu = name in GPU_STAGES
        accelerator = executor.get("resources", {}).get("accelerator")
        if backend == "kfp":
            assert (accelerator is not None) == gpu, name
        else:
            assert accelerator is None, name
    if backend == "kfp":
        asked = executors(spec)["anneal"]["resources"]["accelerator"]
        assert asked["resourceType"] == "nvidia.com/gpu"
        assert asked["resourceCount"] == "2"


def test_a_gpu_stage_is_told_how_many_gpus_to_expect(
    compiled: tuple[str, dict[str, Any], str],
) -> None:
    backend, spec, _ = compiled
    told = {}
    for name, executor in executors(spec).items():
        variables = executor.get("env", [])
        if backend == "vertex" and name in GPU_STAGES:
            pools = custom_job(spec, executor)["worker_pool_specs"]
            variables = pools[0]["container_spec"]["env"]
            assert all(pool["container_spec"]["env"] == variables for pool in pools)
        for variable in variables:
            if variable["name"] == "EXPECTED_GPUS":
                told[name] = variable["value"]
    here = dict.fromkeys(GPU_STAGES, "1") | {"anneal": "2"}
    assert told == ({} if backend == "local" else here)


def test_every_stage_is_told_its_image(compiled: tuple[str, dict[str, Any], str]) -> None:
    backend, spec, _ = compiled
    for name, executor in executors(spec).items():
        variables = list(executor.get("env", ()))
        image = executor.get("image")
        if backend == "vertex" and name in GPU_STAGES:
            container = custom_job(spec, executor)["worker_pool_specs"][0]["container_spec"]
            variables, image = container["env"], container["image_uri"]
        told = [variable["value"] for variable in variables if variable["name"] == "STAGE_IMAGE"]
        assert told == ([] if backend == "local" else [image]), name


def test_gpu_stages_are_custom_jobs_on_vertex(tmp_path: Path) -> None:
    path = compile_to(tmp_path / "pipeline.yaml", load_settings(MACHINES), "vertex")
    spec = next(iter(yaml.safe_load_all(path.read_text())))
    found = executors(spec)
    anneal = custom_job(spec, found["anneal"])
    (pool,) = anneal["worker_pool_specs"]
    assert pool["machine_spec"] == {
        "machine_type": "a3-highgpu-2g",
        "accelerator_type": "NVIDIA_H100_80GB",
        "accelerator_count": 2,
    }
    assert pool["container_spec"]["image_uri"] == IMAGE
    assert anneal["timeout"] == f"{30 * 3600}s"
    assert anneal["strategy"] == "SPOT"
    assert anneal["service_account"] == MACHINES["SERVICE_ACCOUNT"]
    assert anneal["labels"] == {"team": "small-models"}
    assert pool["disk_spec"] == {"boot_disk_size_gb": 200}, "the service chooses the type"
    pools = custom_job(spec, found["continue"])["worker_pool_specs"]
    assert [entry["replica_count"] for entry in pools] == [1, 2]


def test_the_trainings_write_to_the_tensorboard(tmp_path: Path) -> None:
    board = "projects/p/locations/us-central1/tensorboards/1"
    given = MACHINES | {"TENSORBOARD": board, "PIPELINE_ROOT": "gs://bucket/runs/"}
    path = compile_to(tmp_path / "pipeline.yaml", load_settings(given), "vertex")
    found = executors(next(iter(yaml.safe_load_all(path.read_text()))))
    spec = next(iter(yaml.safe_load_all(path.read_text())))
    jobs = {name: custom_job(spec, found[name]) for name in GPU_STAGES}
    boards = {name: job["tensorboard"] for name, job in jobs.items()}
    assert {name: place for name, place in boards.items() if place} == {
        "anneal": board,
        "continue": board,
    }
    places = {name: job["base_output_directory"] for name, job in jobs.items()}
    assert {name: place for name, place in places.items() if place} == {
        "anneal": "gs://bucket/runs/tensorboard/anneal",
        "continue": "gs://bucket/runs/tensorboard/continue",
    }
    assert jobs["anneal"]["service_account"] == MACHINES["SERVICE_ACCOUNT"]


def test_each_worker_that_makes_targets_has_a_machine_of_its_own(
    compiled: tuple[str, dict[str, Any], str], tmp_path: Path
) -> None:
    """A loop of tasks over what the plan says, of which each is a job, or asks for a GPU."""
    backend, spec, _ = compiled
    (loop,) = (
        task
        for part in spec["components"].values()
        for task in part.get("dag", {}).get("tasks", {}).values()
        if "parameterIterator" in task
    )
    assert loop["dependentTasks"] == ["plan-targets"]
    # In the local runner one after another, since it mixes what tasks print
    assert loop.get("iteratorPolicy") == ({"parallelismLimit": 1} if backend == "local" else None)
    worker = executors(spec)["teacher-targets"]
    assert worker["task"]["retryPolicy"]["maxRetryCount"] == (1 if backend == "local" else 3)
    if backend == "kfp":
        assert worker["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
        assert worker["resources"]["cpuLimit"] == 12.0
    if backend == "vertex":
        assert custom_job(spec, worker)["strategy"] == "STANDARD"
        machine = {"MACHINE_TYPE": "g2-standard-12", "ACCELERATOR_TYPE": "NVIDIA_L4"}
        machine |= {"SCHEDULING": "flex_start", "MAX_WAIT_HOURS": "6"}
        given = load_settings({f"TARGETS_{name}": value for name, value in machine.items()})
        path = compile_to(tmp_path / "pipeline.yaml", given, backend)
        other = next(iter(yaml.safe_load_all(path.read_text())))
        job = custom_job(other, executors(other)["teacher-targets"])
        (pool,) = job["worker_pool_specs"]
        assert (job["strategy"], job["max_wait_duration"]) == ("FLEX_START", "21600s")
        assert job["restart_job_on_worker_restart"] is True
        assert pool["machine_spec"]["machine_type"] == "g2-standard-12"


def test_what_targets_cost_is_not_repeated_for_another_seed_or_schedule(
    compiled: tuple[str, dict[str, Any], str],
) -> None:
    tasks = tasks_of(compiled[1])
    assert tasks["teacher-targets"].parameters == {
        "teacher",
        "teacher_name",
        "teacher_revision",
        "eval_ctx_lens",
        "hf_secret_name",
    }
    assert tasks["plan-targets"].after == {"prepare-tokens"}
    assert tasks["train"].after == {"prepare-tokens", "join-targets", "no-targets"}


def test_of_several_machines_the_first_is_compiled(tmp_path: Path) -> None:
    listed = "a3-highgpu-1g:NVIDIA_H100_80GB:1, a2-ultragpu-2g:NVIDIA_A100_80GB:2"
    settings = load_settings({"ANNEAL_MACHINES": listed})
    path = compile_to(tmp_path / "pipeline.yaml", settings, "vertex")
    spec = next(iter(yaml.safe_load_all(path.read_text())))
    (pool,) = custom_job(spec, executors(spec)["anneal"])["worker_pool_specs"]
    assert pool["machine_spec"] == {
        "machine_type": "a3-highgpu-1g",
        "accelerator_type": "NVIDIA_H100_80GB",
        "accelerator_count": 1,
    }
    assert [one.accelerator_count for one in settings.machines["anneal"].alternatives] == [1, 2]


def test_the_type_of_the_boot_disk_may_be_given(tmp_path: Path) -> None:
    settings = load_settings({"ANNEAL_DISK_TYPE": "hyperdisk-balanced"})
    path = compile_to(tmp_path / "pipeline.yaml", settings, "vertex")
    spec = next(iter(yaml.safe_load_all(path.read_text())))
    (pool,) = custom_job(spec, executors(spec)["anneal"])["worker_pool_specs"]
    assert pool["disk_spec"] == {
        "boot_disk_type": "hyperdisk-balanced",
        "boot_disk_size_gb": 200,
    }


def test_titles_hold_no_parameter_of_a_run() -> None:
    """A stage's context, for one, is a parameter: a title with a number in it would lie."""
    assert not [stage.title for stage in STAGES.values() if re.search(r"\d", stage.title)]


def test_image_retries_and_no_installing(compiled: tuple[str, dict[str, Any], str]) -> None:
    backend, spec, text = compiled
    assert not re.search(r"pip3? install|PIP_", text)
    for name, executor in executors(spec).items():
        custom = backend == "vertex" and name in GPU_STAGES
        assert custom or executor["image"] == IMAGE, name
        if backend != "local":
            retry = executor["task"]["retryPolicy"]
            assert retry["maxRetryCount"] == (5 if name == "prepare" else 3)
            assert retry["backoffDuration"] == "60s"


def test_every_stage_is_the_first_process_of_its_container(
    compiled: tuple[str, dict[str, Any], str],
) -> None:
    """The platform sends SIGTERM to that one, and the shell that kfp puts there passes none on."""
    backend, spec, _ = compiled
    for name, executor in executors(spec).items():
        commands = [executor["command"]]
        if backend == "vertex" and name in GPU_STAGES:
            pools = custom_job(spec, executor)["worker_pool_specs"]
            commands = [pool["container_spec"]["command"] for pool in pools]
        for command in commands:
            blocking = command[: command.index("sh")]
            assert blocking == ([] if backend == "local" else ["env", "--block-signal=TERM"])
            script = command[len(blocking) + 2]
            assert len(re.findall("^ *exec python3 -m kfp", script, re.MULTILINE)) == 1, name


def test_no_input_changes_between_submissions(compiled: tuple[str, dict[str, Any], str]) -> None:
    """No time, job id or other placeholder of the run among a task's inputs."""
    _, spec, _ = compiled
    for name, executor in executors(spec).items():
        for key, value in executor["task"].get("inputs", {}).get("parameters", {}).items():
            constant = str(value.get("runtimeValue", {}).get("constant", ""))
            own = re.sub(r"\{\{\$\.(inputs|outputs|json_escape)[^}]*\}\}", "", constant)
            assert not re.search(r"pipeline_job|pipeline_task|create_time|\d{4}-\d\d-\d\d", own), (
                name,
                key,
            )


def test_two_compilations_are_equal(tmp_path: Path) -> None:
    settings = load_settings(MACHINES)
    first, second = (
        compile_to(tmp_path / name, settings, "vertex").read_text() for name in ("a.yaml", "b.yaml")
    )
    assert first == second


def test_parameters_default_to_the_two_runs() -> None:
    expected = {
        "teacher_name": "gpt2-xl",
        "anneal_alpha_schedule": "0:0.7,400:0.5,800:0.3",
        "anneal_temp_schedule": "0:1.2,800:1.0",
        "anneal_train_steps": 1200,
        "anneal_warmup_steps": 200,
        "anneal_lr_peak": 2.7e-4,
        "anneal_block_size": 512,
        "continue_alpha_schedule": "0:0.5,2000:0.4,4000:0.3",
        "continue_train_steps": 6000,
        "continue_warmup_steps": 400,
        "continue_lr_peak": 2.7e-4,
        "continue_grad_accum": 2,
        "continue_block_size": 1024,
        "eval_ctx_lens": "512,1024",
        "resume_gcs_uri": "",
    }
    defaults = parameter_defaults()
    assert {name: defaults[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["ANNEAL_SCHEDULING", "CONTINUE_REPLICAS"])
def test_what_kubeflow_cannot_give(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is for Vertex AI"):
        compile_to(tmp_path / "x.yaml", load_settings({name: MACHINES[name]}), "kfp")


def test_the_model_registry_is_for_vertex_and_only_on_demand(tmp_path: Path) -> None:
    environ = {
        "TRAINER_IMAGE": IMAGE,
        "PROJECT": "p",
        "REGION": "europe-west4",
        "MODEL_NAME": "small-student",
        "SERVING_IMAGE": "europe-docker.pkg.dev/p/r/vllm:1",
        "LABELS": "team=small-models",
    }
    path = compile_to(tmp_path / "pipeline.yaml", load_settings(environ), "vertex")
    found = executors(next(iter(yaml.safe_load_all(path.read_text()))))["register"]
    inputs = found["task"]["inputs"]
    constants = {
        name: value["runtimeValue"]["constant"] for name, value in inputs["parameters"].items()
    }
    assert constants["model_name"] == "small-student"
    assert constants["serving_image"] == environ["SERVING_IMAGE"]
    assert (constants["project"], constants["region"]) == ("p", "europe-west4")
    assert constants["labels"] == {"team": "small-models"}
    assert inputs["artifacts"]["model"]["taskOutputArtifact"]["producerTask"] == "export-hf"
    google = {name: environ[name] for name in ("TRAINER_IMAGE", "MODEL_NAME")}
    for backend in ("kfp", "local"):
        with pytest.raises(UsageError, match=r"MODEL_NAME='small-student': .* is Vertex AI's"):
            compile_to(tmp_path / f"{backend}.yaml", load_settings(google), backend)
        assert not (tmp_path / f"{backend}.yaml").exists()


def test_what_is_made_of_the_export_is_decided_at_run_time(
    compiled: tuple[str, dict[str, Any], str],
) -> None:
    tasks = {task.title: task for task in tasks_of(compiled[1]).values()}
    assert tasks["export"].deciding == {"export"}
    assert tasks["lm-eval"].deciding == {"export", "lm_eval_tasks"}
    assert tasks["evaluate"].deciding == set()


def test_both_trainings_save_what_the_picking_goes_by(
    compiled: tuple[str, dict[str, Any], str],
) -> None:
    tasks = compiled[1]["root"]["dag"]["tasks"]
    for key, name in (("train", "save_best_on"), ("pick-best", "metric")):
        for task in (key, f"{key}-2"):
            given = tasks[task]["inputs"]["parameters"][name]
            assert given == {"componentInputParameter": "best_metric"}


def test_another_name_of_the_gpu_resource(tmp_path: Path) -> None:
    settings = load_settings({"ANNEAL_ACCELERATOR_TYPE": "amd.com/gpu"})
    path = compile_to(tmp_path / "pipeline.yaml", settings, "kfp")
    found = executors(next(iter(yaml.safe_load_all(path.read_text()))))
    kinds = {
        name: executor["resources"]["accelerator"]["resourceType"]
        for name, executor in found.items()
        if "accelerator" in executor["resources"]
    }
    assert kinds == {
        "teacher-targets": "nvidia.com/gpu",
        "anneal": "amd.com/gpu",
        "continue": "nvidia.com/gpu",
        "evaluate": "nvidia.com/gpu",
        "lm-eval": "nvidia.com/gpu",
    }


def test_an_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose one of vertex, kfp, local"):
        compile_to(tmp_path / "x.yaml", load_settings({}), "airflow")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["kfp"], "'kfp': give a path that ends with .yaml"),
        (["pipeline.yaml"], "is where the settings are read from"),
        (["x.yaml", "airflow"], "choose from"),
        (["--backend=kfp"], "unknown flag --backend"),
    ],
)
def test_a_wrong_command_line_writes_nothing(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        main(argv)
    assert list(tmp_path.iterdir()) == []


def test_the_documentation_describes_this_pipeline() -> None:
    text = DOCUMENT.read_text()
    assert text == up_to_date(text), "run python -m pipelines.describe"
    assert up_to_date(text.replace("| `seed` |", "| `sed` |")) == text
    with pytest.raises(LiquidError, match="has no place for machines"):
        up_to_date(text.replace("<!-- machines -->", ""))


@pytest.mark.timeout(120)
def test_a_pipe_is_no_file_to_compile_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipeline.yaml")
    with pytest.raises(UsageError, match="give a path that ends with"):
        compile_to(tmp_path / "pipeline.yaml", load_settings({}), "vertex")
