from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.settings import Machine, known_names, load_settings
from trainer.errors import UsageError


def test_environment_over_file_over_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "project: from-file\nregion: europe-west4\nanneal_spot: true\nlabels: {team: a}\n"
        "continue_replicas: 2\ncmek_key:\n"
    )
    settings = load_settings({"SETTINGS": str(path), "PROJECT": "from-environment"})
    assert settings.project == "from-environment"
    assert settings.region == "europe-west4"
    assert settings.labels == {"team": "a"}
    assert settings.machines["anneal"].spot
    assert settings.machines["continue"].replicas == 2
    assert not settings.machines["continue"].spot
    assert load_settings({}).region == "us-central1"


def test_gpu_stages_ask_for_gpus_and_the_others_do_not() -> None:
    machines = load_settings({}).machines
    assert {stage for stage, machine in machines.items() if machine.gpu} == {
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
        ({"PIPELINE_ROOT": "s3://x"}, "PIPELINE_ROOT='s3://x' must start with gs://"),
        ({"API_TRANSPORT": "http"}, "choose grpc or rest"),
        ({"ANNEAL_RETRIES": "many"}, "ANNEAL_RETRIES='many': a whole number is needed"),
        ({"ANNEAL_SPOT": "perhaps"}, "ANNEAL_SPOT='perhaps': 1 or 0 is needed"),
        ({"PREPARE_ACCELERATOR_COUNT": "1"}, "without PREPARE_ACCELERATOR_TYPE"),
        ({"EVALUATE_REPLICAS": "2"}, "only training takes several"),
        ({"ANNEAL_REPLICAS": "0"}, "ANNEAL_REPLICAS=0 must be at least 1"),
        ({"LABELS": "team"}, "LABELS='team': write NAME=VALUE,NAME=VALUE"),
        ({"SETTINGS": "/no/such.yaml"}, "SETTINGS='/no/such.yaml' does not exist"),
    ],
)
def test_settings_that_make_no_sense(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(environ)
    assert message in str(caught.value)


def test_unknown_names_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("anneal_accelerator_cont: 2")
    with pytest.raises(UsageError, match="did you mean ANNEAL_ACCELERATOR_COUNT?"):
        load_settings({"SETTINGS": str(path)})
    path.write_text("[1, 2")
    with pytest.raises(UsageError, match="cannot be read"):
        load_settings({"SETTINGS": str(path)})


def test_every_setting_has_a_description() -> None:
    names = known_names()
    assert all(names.values())
    assert len([name for name in names if name.startswith("ANNEAL_")]) == len(vars(Machine()))
