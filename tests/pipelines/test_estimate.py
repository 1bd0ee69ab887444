"""The estimate as a command, before a submission, and in the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.describe import DOCUMENT, EXAMPLE
from pipelines.estimates.prices import PRICES
from tests.pipelines.loopback import Loopback
from tests.pipelines.test_submit import (  # noqa: F401 - fixtures
    IMAGE,
    OLD_TITLES,
    environment,
    finished_run,
    last_message,
    run,
    run_process,
    vertex,
)


def test_the_document_shows_what_the_command_prints(tmp_path: Path) -> None:
    done = run_process("estimate", EXAMPLE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    block = DOCUMENT.read_text().partition("<!-- estimate -->")[2].split("```")[1]
    shown = block.strip().splitlines()[1:-1]
    assert done.stdout.splitlines()[: len(shown)] == shown


def test_it_is_compact_and_names_what_was_given() -> None:
    given = {"PARAMS": """seed=7 anneal_more_settings='{"d_model": 512, "n_heads": 8}'"""}
    done = run("estimate", given)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("estimate of liquid-annealing on Vertex AI in us-central1; prices")
    assert "  seed=7" in lines
    assert """  anneal_more_settings='{"d_model": 512, "n_heads": 8}'""" in lines
    rest = done.stdout.partition("parameters as by default:")[2]
    assert "anneal_train_steps=1200" in rest
    assert "seed=" not in rest
    assert max(len(line) for line in rest.splitlines()) <= 100


def test_it_is_json_when_asked_for(tmp_path: Path) -> None:
    prices = tmp_path / "mine.yaml"
    prices.write_text(PRICES.read_text().replace("currency: USD", "currency: EUR"))
    given = {"JSON": "1", "PRICES": str(prices), "PARAMS": "dataset_name=owner/data"}
    done = run("estimate", given)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prices"]["currency"] == "EUR"
    prepare, *_, evaluate = found["stages"]
    assert (prepare["title"], prepare["tokens"]) == ("prepare", None)
    assert prepare["seconds"]["estimate"]["per_token"] > 0
    assert evaluate["price"]["low"]["fixed"] < evaluate["price"]["high"]["fixed"]
    total = sum(stage["price"]["estimate"]["fixed"] for stage in found["stages"])
    assert found["total"]["price"]["estimate"]["fixed"] == pytest.approx(total + 0.03)


@pytest.mark.parametrize(
    ("given", "argv", "message"),
    [
        ({"PARAMS": "seeds=7"}, (), "unknown parameter 'seeds'; did you mean seed?"),
        ({"PARAMS": "anneal_alpha=2"}, (), "stage anneal: anneal_alpha=2 must be between 0 and 1"),
        ({"PRICES": "absent.yaml"}, (), "PRICES='absent.yaml' cannot be read"),
        ({"JSON": "yes"}, (), "JSON='yes': 1 or 0 is needed"),
        ({"ANNEAL_MACHINE_TYPE": "g2-standard-12"}, (), "without ANNEAL_ACCELERATOR_TYPE"),
        ({"ANNEAL_SCHEDULING": "spot"}, ("kfp",), "ANNEAL_SCHEDULING is for Vertex AI"),
    ],
)
def test_wrong_input_is_one_line(
    given: dict[str, str], argv: tuple[str, ...], message: str
) -> None:
    done = run("estimate", given, *argv)
    assert done.returncode == 2
    assert message in last_message(done)
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_what_only_this_machine_has_is_estimated_though_it_could_not_be_sent(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.txt").write_text("text " * 1000)
    done = run("estimate", {"PARAMS": f"dataset_name={tmp_path}"})
    assert done.returncode == 0, done.stderr
    assert "note: submitting would be refused: PARAMS: dataset_name=" in done.stdout


def test_a_cluster(tmp_path: Path) -> None:
    done = run("estimate", {}, "kfp")
    assert done.returncode == 0, done.stderr
    assert "price: not known" in done.stdout


# ── before a submission


def test_a_submission_prints_it_first(
    vertex: Loopback,  # noqa: F811
    environment: dict[str, str],  # noqa: F811
) -> None:
    done = run("submit", environment | {"PARAMS": "seed=7"}, "vertex")
    assert done.returncode == 0, done.stderr
    before, _, _ = done.stdout.partition("submitted projects/")
    assert "\ntotal: " in before
    assert "the run is in europe-west4, where they differ" in before
    assert len([entry for entry in vertex.requests if entry[0] == "POST"]) == 1


def test_a_dry_run_prints_it_and_how_to_see_the_request(
    vertex: Loopback,  # noqa: F811
    environment: dict[str, str],  # noqa: F811
) -> None:
    given = environment | {"DRY_RUN": "1"}
    done = run("submit", given, "vertex")
    assert done.returncode == 0, done.stderr
    assert "\ntotal: " in done.stdout
    assert "pipelineJobId" not in done.stdout
    assert done.stdout.endswith("JSON=1 beside it prints the request\n")
    done = run("submit", environment | {"JSON": "1"}, "vertex")
    assert done.returncode == 2
    assert "JSON=1 prints the request in place of sending it" in last_message(done)
    done = run("submit", environment | {"PRICES": "absent.yaml"}, "vertex")
    assert done.returncode == 2
    assert vertex.requests == []


def test_a_dry_run_for_kubeflow_prints_it_too() -> None:
    given = {"HOST": "http://localhost:9", "TRAINER_IMAGE": IMAGE, "DRY_RUN": "1"}
    done = run("submit", given, "kfp")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("estimate of liquid-annealing on open-source Kubeflow Pipelines")
    assert "pipelineInfo" not in done.stdout


def stages_shown(text: str) -> list[str]:
    table = text.partition("how known\n")[2].partition("\n\n")[0]
    return [line.split()[0] for line in table.splitlines()]


def test_a_repetition_counts_what_runs_again_on_the_machines_that_it_had(
    vertex: Loopback,  # noqa: F811
    environment: dict[str, str],  # noqa: F811
) -> None:
    h100: dict[str, Any] = {
        "CONTINUE_MACHINE_TYPE": "a3-highgpu-8g",
        "CONTINUE_ACCELERATOR_TYPE": "NVIDIA_H100_80GB",
        "CONTINUE_ACCELERATOR_COUNT": "8",
        "CONTINUE_REPLICAS": "2",
        "CONTINUE_SCHEDULING": "spot",
    }
    original = finished_run(vertex, environment | h100)
    given = {"RUN": original, "STAGE": "continue", "PARAMS": "continue_train_steps=8000"}
    done = run("rerun", environment | given | {"DRY_RUN": "1"})
    assert done.returncode == 0, done.stderr
    again = {"continue", "pick-best-continued", "evaluate", "export"}
    assert set(stages_shown(done.stdout)) == again
    assert "2 × a3-highgpu-8g, 8 H100, spot" in done.stdout
    assert "2.1 G" in done.stdout  # 8,000 x 2 x 8 x 16 x 1,024 tokens
    assert "  seed=7\n  continue_train_steps=8000\n" in done.stdout
    assert "originalPipelineJobId" not in done.stdout


def test_a_repetition_of_another_release_leaves_out_what_it_does_not_know(
    vertex: Loopback,  # noqa: F811
    environment: dict[str, str],  # noqa: F811
) -> None:
    original = finished_run(vertex, environment, OLD_TITLES)
    done = run("rerun", environment | {"RUN": original, "STAGE": "continue-1024"})
    assert done.returncode == 0, done.stderr
    again = {"continue-1024", "pick-best-1024", "evaluate", "export"}
    assert set(stages_shown(done.stdout)) == again
    assert "not estimated: of another release" in done.stdout
    assert "without pick-best-1024" in done.stdout
