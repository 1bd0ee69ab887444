"""Each component's body alone, on what the one before it wrote, with the artifacts kfp gives it.

The local runner takes components with artifact inputs only within a pipeline: see
tests/pipelines/test_anneal.py for that.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kfp import dsl

from components.evaluate import evaluate
from components.export_hf import export_hf
from components.join_targets import join_targets
from components.lm_eval_tasks import lm_eval_tasks
from components.no_targets import no_targets
from components.pick_best import pick_best
from components.plan_targets import plan_targets
from components.prepare_tokens import prepare_tokens
from components.resize_reset import resize_reset
from components.teacher_targets import teacher_targets
from components.train import train
from pipelines.compile import compile_to
from pipelines.settings import load_settings
from trainer.checkpoints.reading import read_checkpoint
from trainer.metrics.reading import read_run
from trainer.runtime.errors import CheckpointError, UsageError
from trainer.storage.places import open_location

New = Callable[[type, str], Any]


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> New:
    """An output artifact as kfp hands it out: a path whose directory exists."""
    root = tmp_path_factory.mktemp("components")
    return lambda kind, name: kind(name=name, uri=str(root / name))


def recorded_beside(checkpoints: Any) -> dict[str, Any]:
    """The artifacts for a training's record and its report."""
    return {
        "record": dsl.Artifact(name="record", uri=f"{checkpoints.uri}-record"),
        "report": dsl.HTML(name="report", uri=f"{checkpoints.uri}-report"),
    }


@pytest.fixture(scope="module")
def tokens(new: New, teacher_dir: Path, corpus: Path) -> Any:
    artifact = new(dsl.Dataset, "tokens")
    count = prepare_tokens.python_func(
        teacher_name=str(teacher_dir), dataset_name=str(corpus), tokens=artifact
    )
    assert count == artifact.metadata["train_tokens"]
    return artifact


@pytest.fixture(scope="module")
def trained(new: New, tokens: Any, teacher_dir: Path) -> dict[str, Any]:
    checkpoints, metrics = new(dsl.Model, "checkpoints"), new(dsl.Metrics, "metrics")
    recorded = recorded_beside(checkpoints)
    outputs = train.python_func(
        tokens=tokens,
        teacher_name=str(teacher_dir),
        block_size=32,
        train_steps=4,
        warmup_steps=1,
        lr_peak=1e-3,
        global_batch=4,
        micro_batch=4,
        eval_every=2,
        eval_ctx_lens="32,64",
        more_settings={"d_model": 32, "n_layers": 2, "n_heads": 4, "eval_max_tokens": 500},
        checkpoints=checkpoints,
        metrics=metrics,
        **recorded,
    )
    return {"checkpoints": checkpoints, "metrics": metrics, "outputs": outputs} | recorded


def test_prepare_tokens(tokens: Any) -> None:
    described = json.loads((Path(tokens.path) / "tokens.json").read_text())
    assert tokens.metadata["train_tokens"] == described["train_tokens"]
    assert (Path(tokens.path) / "train.bin").stat().st_size == 2 * described["train_tokens"]


def test_train(trained: dict[str, Any]) -> None:
    best_loss, best_step, steps = trained["outputs"]
    best = json.loads((Path(trained["checkpoints"].path) / "best.pt.meta.json").read_text())
    assert best_loss == best["metrics"]["val_loss_student"]
    assert (best_step, steps) == (best["step"], 4)
    metadata = trained["checkpoints"].metadata
    assert (metadata["block_size"], metadata["pos_embedding"]) == (32, "absolute")
    assert {"kd_alpha", "kd_temperature", "step"} <= set(metadata)
    numbers = json.loads(Path(trained["metrics"].path).read_text())
    assert numbers.items() <= trained["metrics"].metadata.items()
    assert "val_loss_student@64" in trained["metrics"].metadata
    assert read_run(trained["record"].path).end == read_run(trained["checkpoints"].path).end
    assert Path(trained["report"].path).suffix == ".html"
    assert f"{best_loss:.4f}" in Path(trained["report"].path).read_text(encoding="utf-8")


def train_stage(tokens: Any, teacher: str, checkpoints: Any, metrics: Any) -> None:
    """A stage long enough to be killed in."""
    torch.set_num_threads(2)  # sums depend on it, and a process of its own would not inherit it
    train.python_func(
        tokens=tokens,
        teacher_name=teacher,
        block_size=32,
        train_steps=120,
        warmup_steps=1,
        lr_peak=1e-3,
        alpha_schedule="0:0.7,60:0.3",
        global_batch=4,
        micro_batch=4,
        eval_every=50,
        save_every=10,
        more_settings={"d_model": 32, "n_layers": 2, "n_heads": 4, "eval_max_tokens": 500},
        checkpoints=checkpoints,
        metrics=metrics,
        **recorded_beside(checkpoints),
    )


def test_a_killed_stage_goes_on_when_it_is_retried(
    new: New, tokens: Any, teacher_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = (new(dsl.Model, "killed"), new(dsl.Metrics, "killed-metrics"))
    unbroken = (new(dsl.Model, "unbroken"), new(dsl.Metrics, "unbroken-metrics"))
    stage = multiprocessing.get_context("spawn").Process(
        target=train_stage, args=(tokens, str(teacher_dir), *killed)
    )
    stage.start()
    snapshot = Path(killed[0].path) / "ckpt_step_20.pt.meta.json"
    while not snapshot.exists():
        assert stage.is_alive(), "it ended before it could be killed"
        time.sleep(0.005)
    stage.kill()
    stage.join()
    assert not (Path(killed[0].path) / "final.pt").exists()
    for artifacts in (unbroken, killed):
        capsys.readouterr()
        train_stage(tokens, str(teacher_dir), *artifacts)
    start = re.search(r"training from step (\d+) to 120", capsys.readouterr().err)
    assert start
    assert int(start[1]) >= 20
    one, other = (read_checkpoint(Path(model.path) / "final.pt") for model, _ in (killed, unbroken))
    assert one.step == other.step == 120
    for name, value in other.weights.items():
        assert torch.equal(value, one.weights[name])
    assert killed[1].metadata == unbroken[1].metadata


def test_sigterm_to_a_stage_saves_as_the_platform_runs_it(
    new: New, tokens: Any, teacher_dir: Path, tmp_path: Path
) -> None:
    """The compiled command, whose first process alone gets the signal."""
    spec = next(
        iter(
            yaml.safe_load_all(
                compile_to(tmp_path / "pipeline.yaml", load_settings({}), "kfp").read_text()
            )
        )
    )
    container = spec["deploymentSpec"]["executors"]["exec-train"]["container"]
    checkpoints, metrics = new(dsl.Model, "signalled"), new(dsl.Metrics, "signalled-metrics")
    values = {
        "teacher_name": str(teacher_dir),
        "block_size": 32,
        "train_steps": 100_000,
        "warmup_steps": 1,
        "lr_peak": 1e-3,
        "global_batch": 4,
        "micro_batch": 4,
        "log_interval": 1,
        "save_every": 100_000,
        "eval_every": 100_000,
        "more_settings": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    }

    def described(artifact: Any) -> dict[str, Any]:
        kind = {"schemaTitle": artifact.schema_title, "schemaVersion": "0.0.1"}
        entry = {"name": artifact.name, "uri": artifact.uri, "type": kind, "metadata": {}}
        return {"artifacts": [entry]}

    executor_input = {
        "inputs": {"parameterValues": values, "artifacts": {"tokens": described(tokens)}},
        "outputs": {
            "artifacts": {
                name: described(artifact) for name, artifact in recorded_beside(checkpoints).items()
            }
            | {"checkpoints": described(checkpoints), "metrics": described(metrics)},
            "parameters": {
                name: {"outputFile": str(tmp_path / name)}
                for name in ("best_loss", "best_step", "steps")
            },
            "outputFile": str(tmp_path / "output.json"),
        },
    }
    arguments = [
        json.dumps(executor_input) if part == "{{$}}" else part for part in container["args"]
    ]
    root = Path(__file__).parents[2]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    stage = subprocess.Popen(
        [*container["command"], *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'trainer_image'}", "PATH": path},
    )
    assert stage.stderr is not None
    seen = []
    for line in stage.stderr:
        seen.append(line)
        if '"step 2/100000' in line:
            stage.send_signal(signal.SIGTERM)
            break
    _, rest = stage.communicate(timeout=60)
    assert stage.returncode == 143, "".join(seen) + rest
    (saved,) = Path(checkpoints.path).glob("ckpt_step_*.pt")
    assert read_checkpoint(saved).step >= 2
    assert json.loads(rest.splitlines()[-1])["message"].startswith("stopped by SIGTERM at step")


def machine(
    index: int, port: int, tokens: Any, teacher: str, checkpoints: Any, metrics: Any, ended: Any
) -> None:
    """One of two machines of a Vertex job, as the platform starts it."""
    pools = {"workerpool0": [f"127.0.0.1:{port}"], "workerpool1": ["127.0.0.1:0"]}
    task = {"type": f"workerpool{index}", "index": 0}
    os.environ["CLUSTER_SPEC"] = json.dumps({"cluster": pools, "task": task})
    os.environ["OMP_NUM_THREADS"] = "1"
    outputs = train.python_func(
        tokens=tokens,
        teacher_name=teacher,
        block_size=32,
        train_steps=4,
        warmup_steps=1,
        lr_peak=1e-3,
        micro_batch=2,
        eval_every=2,
        more_settings={
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "eval_max_tokens": 500,
            "global_batch": 4,
        },
        checkpoints=checkpoints,
        metrics=metrics,
        **recorded_beside(checkpoints),
    )
    ended.put((index, tuple(outputs)))


def test_two_machines_train_together_and_the_first_reports(
    new: New, tokens: Any, teacher_dir: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    checkpoints = new(dsl.Model, "together")
    metrics = [new(dsl.Metrics, f"metrics-{index}") for index in (0, 1)]
    context = multiprocessing.get_context("spawn")
    ended = context.Queue()
    machines = [
        context.Process(
            target=machine,
            args=(index, port, tokens, str(teacher_dir), checkpoints, metrics[index], ended),
        )
        for index in (0, 1)
    ]
    for process in machines:
        process.start()
    outputs = dict(ended.get(timeout=300) for _ in machines)
    for process in machines:
        process.join()
        assert process.exitcode == 0
    meta = json.loads((Path(checkpoints.path) / "final.pt.meta.json").read_text())
    assert (meta["step"], meta["global_batch"], meta["grad_accum"]) == (4, 4, 1)
    assert outputs[0][2] == 4
    written = [Path(f"{artifact.path}.json") for artifact in metrics]
    assert json.loads(written[0].read_text())["val_loss_student"] > 0
    assert outputs[1][1:] == (-1, -1)
    assert not written[1].exists()


def test_pick_resize_and_evaluate(
    new: New, tokens: Any, trained: dict[str, Any], teacher_dir: Path
) -> None:
    model, resized = new(dsl.Model, "best"), new(dsl.Model, "resized")
    loss, step = pick_best.python_func(
        checkpoints=trained["checkpoints"], best=model, metric="val_loss_student@64"
    )
    assert Path(model.path).parent == Path(trained["checkpoints"].path)
    assert model.metadata["metric"] == "val_loss_student@64"
    assert loss == model.metadata["value"]
    old_step = resize_reset.python_func(
        checkpoint=model, block_size=64, pos_resize="copy", resized=resized
    )
    assert old_step == step
    assert resized.metadata["trained_positions"] == 64
    metrics, table = new(dsl.Metrics, "evaluated"), new(dsl.Markdown, "table")
    report = new(dsl.HTML, "report")
    before, after = evaluate.python_func(
        tokens=tokens,
        before=model,
        after=resized,
        teacher_name=str(teacher_dir),
        eval_ctx_lens="32,64",
        more_settings={"eval_max_tokens": 500},
        record_before=trained["record"],
        metrics=metrics,
        report=report,
        table=table,
    )
    rows = json.loads(Path(metrics.path).read_text())
    assert len(rows) == 4
    assert (before, after) == (rows[1]["student_loss"], rows[3]["student_loss"])
    shown = [f"{row['student_loss']:.4f}" for row in rows]
    for artifact, suffix in ((report, ".html"), (table, ".md")):
        assert Path(artifact.path).suffix == suffix
        text = Path(artifact.path).read_text(encoding="utf-8")
        assert all(loss in text for loss in shown)
        assert f"all {rows[0]['tokens_of_split']:,} tokens" not in text
        assert f"{rows[0]['tokens']:,} of the {rows[0]['tokens_of_split']:,} tokens" in text


PLANNED = {
    "target_workers": 2,
    "target_bytes": 32,
    "anneal_block_size": 32,
    "anneal_temperature": 3.0,
    "anneal_temp_schedule": "0:1.2,4:1.0",
    "continue_block_size": 64,
    "continue_temperature": 1.0,
    "continue_temp_schedule": "2:0.8",
}


def test_the_plan_serves_both_trainings() -> None:
    """An entry at update 0 leaves none for the temperature before it."""
    shares = [json.loads(share) for share in plan_targets.python_func(**PLANNED)]
    assert [share.pop("worker") for share in shares] == [0, 1]
    assert shares == 2 * [
        {
            "teacher_context": 64,
            "target_temperatures": [0.8, 1.0, 1.2],
            "target_bytes": 32,
            "workers": 2,
        }
    ]
    for given, message in (
        ({"target_bytes": 0}, "--target_bytes=0 must be at least 1"),
        ({"anneal_temp_schedule": "0:0"}, "--temp_schedule='0:0': entry 1"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_targets.python_func(**PLANNED | given)


def test_a_training_reads_the_targets_that_workers_made(
    new: New, tokens: Any, teacher_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"tokens": tokens, "teacher_name": str(teacher_dir), "eval_ctx_lens": "32,64"}
    shares = [new(dsl.Dataset, f"share-{n}") for n in range(2)]
    places = [
        teacher_targets.python_func(share=planned, targets=share, **given)
        for share, planned in zip(shares, plan_targets.python_func(**PLANNED), strict=True)
    ]
    joined = new(dsl.Dataset, "targets")
    (place,) = join_targets.python_func(places=[there for (there,) in places], targets=joined)
    described = json.loads((Path(joined.path) / "targets.json").read_text())
    assert place == joined.path
    assert joined.metadata["digest"] == f"sha256:{described['fingerprint']}"
    assert joined.metadata["input tokens"] == tokens.metadata["digest"]
    assert joined.metadata["input share 1"] == shares[0].metadata["digest"]
    assert "input share 2" not in joined.metadata, "so few tokens are one shard"
    capsys.readouterr()
    checkpoints = new(dsl.Model, "on-targets")
    train.python_func(
        teacher_targets=place,
        block_size=32,
        train_steps=2,
        warmup_steps=1,
        lr_peak=1e-3,
        temp_schedule=PLANNED["anneal_temp_schedule"],
        global_batch=4,
        micro_batch=4,
        more_settings={"d_model": 32, "n_layers": 2, "n_heads": 4, "eval_max_tokens": 500},
        checkpoints=checkpoints,
        metrics=new(dsl.Metrics, "on-targets-metrics"),
        **recorded_beside(checkpoints),
        **given,
    )
    assert f"in place of the teacher: its targets at {place}" in capsys.readouterr().err
    meta = json.loads((Path(checkpoints.path) / "final.pt.meta.json").read_text())
    assert meta["teacher_targets"] == described["fingerprint"]
    assert checkpoints.metadata["input teacher targets"] == joined.metadata["digest"]
    assert "val_loss_teacher@64" in meta["metrics"]
    assert no_targets.python_func() == ("",), "what a training takes for the teacher itself"


def test_targets_in_a_store_that_other_machines_cannot_read(
    new: New, tokens: Any, teacher_dir: Path
) -> None:
    (share, _) = plan_targets.python_func(**PLANNED)
    elsewhere = dsl.Dataset(name="targets", uri="minio://bucket/targets")
    with pytest.raises(UsageError, match=r"minio://bucket/targets: other machines cannot read it"):
        teacher_targets.python_func(
            tokens=tokens,
            teacher_name=str(teacher_dir),
            share=share,
            eval_ctx_lens="32",
            targets=elsewhere,
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"more_settings": {"drop_out": 0.1}},
            "unknown setting 'drop_out'; did you mean 'dropout'",
        ),
        ({"train_steps": 0}, "--train_steps=0 trains nothing"),
        ({"more_settings": {"config": "other.yaml"}}, "'config' names a file"),
        ({"grad_accum": 2, "more_settings": {"global_batch": 64}}, "leave one of them out"),
    ],
)
def test_settings_that_a_training_refuses(
    new: New, tokens: Any, teacher_dir: Path, given: dict[str, Any], message: str
) -> None:
    settings = {"block_size": 32, "train_steps": 4, "warmup_steps": 1, "lr_peak": 1e-3} | given
    checkpoints = new(dsl.Model, "refused")
    with pytest.raises(UsageError, match=re.escape(message)):
        train.python_func(
            tokens=tokens,
            teacher_name=str(teacher_dir),
            checkpoints=checkpoints,
            metrics=new(dsl.Metrics, "refused-metrics"),
            **recorded_beside(checkpoints),
            **settings,
        )
    assert not Path(checkpoints.path).exists()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("raise UsageError('--alpha=2 must be\\nbetween 0 and 1')", 2, "--alpha=2 must be between"),
        ("{}['absent']", 1, "unexpected failure: Traceback (most recent call last):"),
    ],
)
def test_a_failure_of_a_stage_is_one_entry_of_the_log(body: str, status: int, message: str) -> None:
    code = (
        "from trainer.runtime.commands import start_stage\n"
        "from trainer.runtime.errors import UsageError\n"
        f"start_stage(); {body}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    record = json.loads(line)
    assert record["severity"] == "ERROR"
    assert record["message"].startswith(message)


def test_export_hf(new: New, trained: dict[str, Any], teacher_dir: Path) -> None:
    best, exported = new(dsl.Model, "best-exported"), new(dsl.Model, "exported")
    pick_best.python_func(checkpoints=trained["checkpoints"], best=best)
    positions = export_hf.python_func(checkpoint=best, exported=exported, license="mit")
    assert positions == exported.metadata["positions"] == 32
    assert exported.metadata["architecture"] == "GPT2LMHeadModel"
    assert exported.metadata["metric val_loss_student@64"] > 0
    assert "license: mit" in Path(exported.path, "README.md").read_text()
    with pytest.raises(UsageError, match="is in use; give a new directory"):
        export_hf.python_func(checkpoint=best, exported=exported)


def test_an_export_that_was_cut_off_is_made_again(
    new: New, trained: dict[str, Any], gcs_bucket: str
) -> None:
    best = new(dsl.Model, "best-again")
    pick_best.python_func(checkpoints=trained["checkpoints"], best=best)
    uri = f"{gcs_bucket}/exported"
    open_location(uri).put_bytes(b"half", "model.safetensors")
    export_hf.python_func(checkpoint=best, exported=dsl.Model(name="exported", uri=uri))
    found = {entry.name: entry.size for entry in open_location(uri).list()}
    assert found["model.safetensors"] > 4
    assert "config.json" in found


def test_lm_eval_tasks_needs_lm_eval(new: New) -> None:
    """Refused in one line where it is missing; tests/trainer/test_lm_eval_tasks.py runs it."""
    outputs = {"metrics": new(dsl.Metrics, "lm-m"), "report": new(dsl.Markdown, "lm-r")}
    with pytest.raises(UsageError, match=r"there is no task; give --tasks"):
        lm_eval_tasks.python_func(model=new(dsl.Model, "none"), tasks="", **outputs)


def test_accumulation_may_come_with_the_further_settings(
    new: New, tokens: Any, teacher_dir: Path
) -> None:
    checkpoints = new(dsl.Model, "accumulated")
    small = {"d_model": 32, "n_layers": 2, "n_heads": 4, "eval_max_tokens": 500}
    train.python_func(
        tokens=tokens,
        teacher_name=str(teacher_dir),
        block_size=32,
        train_steps=1,
        warmup_steps=1,
        lr_peak=1e-3,
        micro_batch=2,
        more_settings=small | {"grad_accum": 3},
        checkpoints=checkpoints,
        metrics=new(dsl.Metrics, "accumulated-metrics"),
        **recorded_beside(checkpoints),
    )
    meta = json.loads((Path(checkpoints.path) / "final.pt.meta.json").read_text())
    assert (meta["grad_accum"], meta["global_batch"]) == (3, 6)


def test_empty_texts_stand_for_defaults(new: New, trained: dict[str, Any]) -> None:
    best, resized = new(dsl.Model, "best-default"), new(dsl.Model, "resized-default")
    pick_best.python_func(checkpoints=trained["checkpoints"], best=best, metric="")
    assert best.metadata["metric"] == "val_loss_student"
    resize_reset.python_func(checkpoint=best, block_size=48, pos_resize="", resized=resized)
    assert read_checkpoint(Path(resized.path)).meta["origin"]["pos_resize"] == "linear"
    for given, message in (
        ({"block_size": 0}, "--block_size=0 must be at least 1"),
        ({"block_size": 48, "pos_resize": "cubic"}, "--pos_resize='cubic': choose one of"),
    ):
        with pytest.raises(UsageError, match=message):
            resize_reset.python_func(checkpoint=best, resized=new(dsl.Model, "none"), **given)


def test_picking_where_nothing_qualifies_lists_what_was_found(
    new: New, trained: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"finite 'val_loss_student@4096'; found: best.pt"):
        pick_best.python_func(
            checkpoints=trained["checkpoints"],
            best=new(dsl.Model, "none"),
            metric="val_loss_student@4096",
        )
