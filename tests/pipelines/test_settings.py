from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.settings import Machine, known_names, load_settings
from trainer.runtime.errors import UsageError


def test_environment_over_file_over_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "project: from-file\nregion: europe-west4\nanneal_scheduling: spot\nlabels: {team: a}\n"
        "continue_replicas: 2\ncmek_key:\n"
    )
    settings = load_settings({"SETTINGS": str(path), "PROJECT": "from-environment"})
    assert settings.project == "from-environment"
    assert settings.region == "europe-west4"
    assert settings.labels == {"team": "a"}
    assert settings.machines["anneal"].scheduling == "spot"
    assert settings.machines["continue"].replicas == 2
    assert settings.machines["continue"].scheduling == "standard"
    assert load_settings({}).region == "us-central1"


def test_gpu_stages_ask_for_gpus_and_the_others_do_not() -> None:
    machines = load_settings({}).machines
    assert {stage for stage, machine in machines.items() if machine.gpu} == {
        "targets",
        "anneal",
        "continue",
        "evaluate",
    }


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        load_settings({"REGION": "x"}).require("project", "region", "pipeline_root")
    message = str(caught.value)
    assert "PROJECT (Google Cloud project); PIPELINE_ROOT (gs:// prefix" in message
    assert "REGION" not in message
    assert "make PROJECT=…" in message


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PIPELINE_ROOT": "bucket/x"}, "PIPELINE_ROOT='bucket/x' must start with gs://"),
        ({"API_TRANSPORT": "http"}, "choose grpc or rest"),
        ({"POLL_SECONDS": "9" * 400}, "must be at most 2147483647"),
        ({"ANNEAL_RETRIES": "9" * 5000}, "9…: a whole number is needed"),
        ({"ANNEAL_RETRIES": "many"}, "ANNEAL_RETRIES='many': a whole number is needed"),
        ({"ANNEAL_SCHEDULING": "perhaps"}, "choose one of standard, spot, flex_start"),
        ({"ANNEAL_SPOT": "1"}, "ANNEAL_SPOT is of an earlier release; give ANNEAL_SCHEDULING=spot"),
        ({"ANNEAL_MAX_WAIT_HOURS": "9999"}, "ANNEAL_MAX_WAIT_HOURS=9999 must be at most 8760"),
        ({"ANNEAL_MACHINES": "a2-highgpu-1g"}, "ANNEAL_MACHINES: 'a2-highgpu-1g' is not TYPE:ACC"),
        (
            {"ANNEAL_MACHINES": "g2-standard-4:NVIDIA_L4:1", "ANNEAL_ACCELERATOR_COUNT": "1"},
            "ANNEAL_MACHINES and ANNEAL_ACCELERATOR_COUNT are both given; leave one out",
        ),
        ({"PREPARE_ACCELERATOR_COUNT": "1"}, "without PREPARE_ACCELERATOR_TYPE"),
        ({"EVALUATE_REPLICAS": "2"}, "only training takes several"),
        ({"TARGETS_ACCELERATOR_COUNT": "8"}, "each worker uses one GPU; give PARAMS=target_wor"),
        ({"ANNEAL_REPLICAS": "0"}, "ANNEAL_REPLICAS=0 must be at least 1"),
        ({"LABELS": "team"}, "LABELS='team': write NAME=VALUE,NAME=VALUE"),
        ({"LABELS": "Team=a"}, "LABELS: Team=a is not a label of Google Cloud"),
        ({"LABELS": "team=" + "x" * 64}, "63 at most"),
        ({"ANNEAL_BACKOFF_SECONDS": "-1"}, "ANNEAL_BACKOFF_SECONDS=-1 must be at least 0"),
        ({"ANNEAL_ACCELERATOR_COUNT": "-1"}, "ANNEAL_ACCELERATOR_COUNT=-1 must be at least 0"),
        ({"PICK_CPU": "0"}, "PICK_CPU='0': a number of cores is needed"),
        ({"PICK_MEMORY": "0Gi"}, "PICK_MEMORY='0Gi': write it as"),
        ({"ANNEAL_ACCELERATOR_CNT": "8"}, "did you mean ANNEAL_ACCELERATOR_COUNT?"),
        ({"ANNEAL_MACHINETYPE": "x"}, "unknown setting ANNEAL_MACHINETYPE; did you mean"),
        ({"PICK_CPU": "two"}, "PICK_CPU='two': a number of cores is needed"),
        ({"PICK_MEMORY": "4 GB"}, "PICK_MEMORY='4 GB': write it as 32Gi or 32G"),
        ({"SETTINGS": "/no/such.yaml"}, "SETTINGS='/no/such.yaml' does not exist"),
    ],
)
def test_settings_that_make_no_sense(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(environ)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PIPELINE_ROOT": "s3://x"}, "PIPELINE_ROOT='s3://x' must start with gs://"),
        ({"PREPARE_SCHEDULING": "spot"}, "PREPARE_SCHEDULING is for a custom job"),
        ({"ANNEAL_ACCELERATOR_COUNT": "0", "ANNEAL_REPLICAS": "2"}, "ANNEAL_REPLICAS is for a"),
        (
            {"PICK_ACCELERATOR_COUNT": "1", "PICK_ACCELERATOR_TYPE": "NVIDIA_L4"},
            "PICK_ACCELERATOR_TYPE=NVIDIA_L4 without PICK_MACHINE_TYPE",
        ),
        (
            {"ANNEAL_ACCELERATOR_COUNT": "2"},
            "ANNEAL_ACCELERATOR_COUNT=2, but ANNEAL_MACHINE_TYPE=a2-highgpu-1g has 1",
        ),
        (
            {"ANNEAL_MACHINE_TYPE": "a3-highgpu-1g"},
            "ANNEAL_MACHINE_TYPE=a3-highgpu-1g without ANNEAL_ACCELERATOR_TYPE, whose default is"
            " NVIDIA_TESLA_A100; give both",
        ),
        (
            {"ANNEAL_ACCELERATOR_TYPE": "NVIDIA_L4"},
            "ANNEAL_ACCELERATOR_TYPE=NVIDIA_L4 without ANNEAL_MACHINE_TYPE, whose default is"
            " a2-highgpu-1g; give both",
        ),
        (
            {"ANNEAL_MACHINES": "g2-standard-4:NVIDIA_L4:1, a2-highgpu-1g:NVIDIA_A10:1"},
            "ANNEAL_ACCELERATOR_TYPE='NVIDIA_A10' is none of Vertex AI's",
        ),
        (
            {"ANNEAL_MACHINES": "g2-standard-4:NVIDIA_L4:1, a2-highgpu-1g:NVIDIA_L4:1"},
            "ANNEAL_MACHINE_TYPE=a2-highgpu-1g carries 1 x NVIDIA_TESLA_A100, not",
        ),
        (
            {
                "ANNEAL_SCHEDULING": "flex_start",
                "ANNEAL_MACHINES": "n1-standard-8:NVIDIA_TESLA_T4:1",
            },
            "ANNEAL_SCHEDULING=flex_start is not for NVIDIA_TESLA_T4",
        ),
        (
            {"ANNEAL_SCHEDULING": "flex_start", "ANNEAL_TIMEOUT_HOURS": "200"},
            "ANNEAL_TIMEOUT_HOURS=200: with ANNEAL_SCHEDULING=flex_start a job may take 168",
        ),
        ({"PREPARE_TIMEOUT_HOURS": "1"}, "PREPARE_TIMEOUT_HOURS: Vertex AI would not use it"),
        ({"ANNEAL_CPU": "4"}, "ANNEAL_CPU: Vertex AI would not use it, since its machine type"),
        ({"MODEL_NAME": "Small"}, "MODEL_NAME='Small' is no id of a model; it takes lowercase"),
        ({"MODEL_NAME": "small"}, "MODEL_NAME='small' without SERVING_IMAGE"),
        ({"SERVING_IMAGE": "r/vllm"}, "SERVING_IMAGE='r/vllm' without MODEL_NAME"),
        ({"MODEL_NAME": "a", "SERVING_IMAGE": "b"}, "missing: PROJECT (Google Cloud project)"),
    ],
)
def test_machines_that_vertex_would_refuse(environ: dict[str, str], message: str) -> None:
    settings = load_settings(environ)  # other backends may have them
    with pytest.raises(UsageError) as caught:
        settings.check_vertex()
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["ANNEAL_MACHINE_TYPE", "PICK_DISK_GIB", "ANNEAL_MAX_WAIT_HOURS"])
def test_what_kubeflow_would_not_use(name: str) -> None:
    settings = load_settings({name: "99"})
    with pytest.raises(UsageError, match=f"{name}: open-source Kubeflow Pipelines would not use"):
        settings.check_kubeflow()


def test_names_of_others_are_left_alone() -> None:
    load_settings({"CONTINUE_ON_ERROR": "1", "PREPARE_": "x", "PICK_ME": "2"})


def test_accelerators_that_vertex_does_not_know() -> None:
    settings = load_settings(
        {"ANNEAL_MACHINE_TYPE": "n1-standard-8", "ANNEAL_ACCELERATOR_TYPE": "NVIDIA_TSLA_T4"}
    )
    with pytest.raises(UsageError, match=r"'NVIDIA_TSLA_T4' is none of .* mean NVIDIA_TESLA_T4\?"):
        settings.check_vertex()


def test_the_machine_must_carry_the_accelerator() -> None:
    given = {"ANNEAL_MACHINE_TYPE": "n1-standard-8", "ANNEAL_ACCELERATOR_TYPE": "NVIDIA_L4"}
    with pytest.raises(UsageError, match="cannot carry ANNEAL_ACCELERATOR_TYPE=NVIDIA_L4"):
        load_settings(given).check_vertex()
    with pytest.raises(UsageError, match=r"none of Vertex AI's; did you mean NVIDIA_H100_80GB\?"):
        load_settings(given | {"ANNEAL_ACCELERATOR_TYPE": "NVIDIA_H100"}).check_vertex()


def test_machines_that_vertex_takes() -> None:
    load_settings({}).check_vertex()
    larger = {"ANNEAL_MACHINE_TYPE": "a2-highgpu-8g", "ANNEAL_ACCELERATOR_COUNT": "8"}
    load_settings(larger).check_vertex()
    load_settings(
        {
            "ANNEAL_MACHINE_TYPE": "a3-megagpu-8g",
            "ANNEAL_ACCELERATOR_TYPE": "NVIDIA_H100_MEGA_80GB",
            "ANNEAL_ACCELERATOR_COUNT": "8",
            "ANNEAL_REPLICAS": "2",
            "CONTINUE_MACHINE_TYPE": "g2-standard-48",
            "CONTINUE_ACCELERATOR_TYPE": "NVIDIA_L4",
            "CONTINUE_ACCELERATOR_COUNT": "4",
            "EVALUATE_MACHINE_TYPE": "n1-standard-16",
            "EVALUATE_ACCELERATOR_TYPE": "NVIDIA_TESLA_T4",
            "EVALUATE_ACCELERATOR_COUNT": "2",
        }
    ).check_vertex()


def test_processes_are_counted_over_machines() -> None:
    settings = load_settings({"ANNEAL_REPLICAS": "2", "ANNEAL_ACCELERATOR_COUNT": "8"})
    assert settings.processes("vertex")["anneal"] == 16
    assert settings.processes("kfp")["anneal"] == 8
    assert settings.processes("vertex")["prepare"] == 1


def test_unknown_names_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("anneal_accelerator_cont: 2")
    with pytest.raises(UsageError, match="did you mean ANNEAL_ACCELERATOR_COUNT?"):
        load_settings({"SETTINGS": str(path)})
    path.write_text("labels: {country: no}\npick_memory: 4Gi\npick_retries: 2")
    settings = load_settings({"SETTINGS": str(path)})
    assert settings.labels == {"country": "no"}
    assert settings.machines["pick"].retries == 2
    path.write_text("labels: {team: }")
    assert load_settings({"SETTINGS": str(path)}).labels == {"team": ""}
    path.write_text("experiment: [a, b]")
    with pytest.raises(UsageError, match=r"EXPERIMENT=\['a', 'b'\]: one value is needed"):
        load_settings({"SETTINGS": str(path)})
    path.write_text("pick_cpu: 4\nPICK_CPU: 5")
    with pytest.raises(UsageError, match="PICK_CPU is given twice"):
        load_settings({"SETTINGS": str(path)})
    path.write_text("[1, 2")
    with pytest.raises(UsageError, match="is not valid YAML"):
        load_settings({"SETTINGS": str(path)})


def test_every_setting_has_a_description() -> None:
    names = known_names()
    assert all(names.values())
    assert len([name for name in names if name.startswith("ANNEAL_")]) == len(vars(Machine()))
