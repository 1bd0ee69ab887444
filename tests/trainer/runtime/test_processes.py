"""Several processes: on the CPU with gloo here; the same code runs over NCCL on GPUs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.metrics.records import lasting_lines
from trainer import entrypoint
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.reading import read_checkpoint
from trainer.metrics.reading import read_run
from trainer.runtime.devices import EXPECTED_GPUS, count_gpus
from trainer.runtime.errors import DeviceError, UsageError
from trainer.runtime.processes import Nodes, find_nodes, joined_processes
from trainer.settings.config import TrainConfig
from trainer.training.precision import choose_precision

Settings = dict[str, Any]


def torchrun(settings: Settings, processes: int = 2) -> list[str]:
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--log-dir=/dev/null"),
        *("-m", "trainer.entrypoint", *flags),
    ]


def run(settings: Settings, processes: int = 2) -> str:
    done = subprocess.run(
        torchrun(settings, processes),
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def close(first: Checkpoint, second: Checkpoint) -> None:
    assert first.step == second.step
    for name, tensor in first.weights.items():
        assert torch.allclose(tensor, second.weights[name], rtol=1e-4, atol=5e-6), name
    ours, theirs = first.optimizer_by_name(), second.optimizer_by_name()
    for name, moments in ours.items():
        assert torch.allclose(moments["exp_avg"], theirs[name]["exp_avg"], rtol=1e-3, atol=1e-6)
    for key, value in first.meta["metrics"].items():
        assert value == pytest.approx(second.meta["metrics"][key], rel=1e-5), key


@pytest.fixture
def batched(settings: Settings) -> Settings:
    del settings["global_batch"]
    return settings | {"micro_batch": 2, "train_steps": 4, "save_every": 2, "eval_every": 2}


@pytest.mark.parametrize("scheme", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_twice_the_accumulation(
    batched: Settings, tmp_path: Path, scheme: str
) -> None:
    """Same windows, same update within rounding; and any world size resumes any other's file."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone = batched | {"grad_accum": 4, "local_workdir": str(one)}
    entrypoint.run(alone)
    stderr = run(
        batched
        | {"grad_accum": 2, "local_workdir": str(two), "parallel": scheme, "shard_teacher": True}
        | ({"shard_teacher": False} if scheme == "ddp" else {})
    )
    steps = [line for line in stderr.splitlines() if '"step 4/4' in line]
    assert len(steps) == 1, "rank 0 alone logs"
    close(read_checkpoint(one / "final.pt"), read_checkpoint(two / "final.pt"))
    if scheme == "fsdp":
        cut = str(two / "ckpt_step_2.pt")
        entrypoint.run(alone | {"local_workdir": str(tmp_path / "resumed"), "resume_gcs_uri": cut})
        close(read_checkpoint(one / "final.pt"), read_checkpoint(tmp_path / "resumed" / "final.pt"))


def test_a_signal_stops_all_processes_at_one_step_and_the_run_goes_on(
    batched: Settings, tmp_path: Path
) -> None:
    long = batched | {"grad_accum": 1, "train_steps": 400, "eval_every": 1000, "log_interval": 5}
    flags = long | {"local_workdir": str(tmp_path / "work"), "save_every": 1000}
    process = subprocess.Popen(
        torchrun(flags),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if '"step 10/400' in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) != 0
    assert "saving step" in rest
    (snapshot,) = (tmp_path / "work").glob("ckpt_step_*.pt")
    step = read_checkpoint(snapshot).step
    assert 10 <= step < 400
    again = run(flags)
    assert f"at step {step}" in again


def test_a_signal_to_the_launcher_of_several_machines_is_a_stop(
    batched: Settings, tmp_path: Path
) -> None:
    """As Vertex AI stops a job: each machine's first process gets SIGTERM."""
    long = batched | {"grad_accum": 1, "train_steps": 4000, "eval_every": 10_000}
    flags = long | {"local_workdir": str(tmp_path / "work"), "save_every": 10_000}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        pools = {"workerpool0": [f"127.0.0.1:{free.getsockname()[1]}"], "workerpool1": ["x:1"]}
    machines = []
    for index in (0, 1):
        task = {"type": f"workerpool{index}", "index": 0}
        spec = json.dumps({"cluster": pools, "task": task})
        command = [f"--{name}={value}" for name, value in (flags | {"log_interval": 5}).items()]
        machines.append(
            subprocess.Popen(
                [sys.executable, "-m", "trainer.entrypoint", *command],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "CLUSTER_SPEC": spec},
            )
        )
    first = machines[0].stderr
    assert first is not None
    assert any('"step 10/4000' in line for line in first)
    for machine in machines:
        machine.send_signal(signal.SIGTERM)
    texts = [machine.communicate(timeout=120)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [143, 143], texts
    last = json.loads(texts[0].splitlines()[-1])
    assert last["message"] == "stopped by SIGTERM; start it again to go on"
    assert not any("Traceback" in text for text in texts)
    (snapshot,) = (tmp_path / "work").glob("ckpt_step_*.pt")
    assert read_checkpoint(snapshot).step >= 10


def run_script(
    script: str, settings: Settings, directory: Path
) -> subprocess.CompletedProcess[str]:
    """A program in place of the entrypoint's, in two processes; it works in ``work``."""
    path = directory / "script.py"
    path.write_text(script)
    command = torchrun(settings | {"local_workdir": str(directory / "work")})
    place = command.index("trainer.entrypoint")
    command[place - 1 : place + 1] = [str(path)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def assert_records_close(work: Path, whole: Path) -> None:
    """One process's record and that of two, of which one was stopped, differ by rounding."""
    ours, theirs = (
        [line for line in lasting_lines(str(path)) if line["kind"] != "header"]
        for path in (work, whole)
    )
    assert [(line["kind"], line["step"]) for line in ours] == [
        (line["kind"], line["step"]) for line in theirs
    ]
    for line, other in zip(ours, theirs, strict=True):
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=1e-3)
    assert [line["step"] for line in read_run(str(work)).starts] == [2]
    assert read_run(str(work)).header["machine"]["processes"] == 2


SIGNAL_IN_EVALUATION = """
import os
import signal
import sys

from trainer import entrypoint
from trainer.training import evaluation
from trainer.runtime.commands import run_command

real, seen = evaluation.evaluation_batches, []

def watched(*args, **kwargs):
    for batch in real(*args, **kwargs):
        seen.append(batch)
        if os.environ["RANK"] == "1" and len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
        if len(seen) > 3:
            print("one more batch", file=sys.stderr)

evaluation.evaluation_batches = watched
sys.exit(run_command(entrypoint.main))
"""


@pytest.mark.parametrize("scheme", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_signal_to_one_process_breaks_the_evaluation_off_in_all(
    batched: Settings, tmp_path: Path, scheme: str
) -> None:
    """The other one must not wait for it in a collective, or go on alone."""
    settings = batched | {"grad_accum": 1, "parallel": scheme, "save_every": 1000}
    done = run_script(SIGNAL_IN_EVALUATION, settings, tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("SIGTERM: saving step 2 and stopping") == 2, done.stderr[-4000:]
    assert "one more batch" not in done.stderr
    (snapshot,) = (tmp_path / "work").glob("ckpt_step_*.pt")
    assert read_checkpoint(snapshot).step == 2
    run(settings | {"local_workdir": str(tmp_path / "work")})
    entrypoint.run(settings | {"grad_accum": 2, "local_workdir": str(tmp_path / "whole")})
    ended, whole = (read_checkpoint(tmp_path / name / "final.pt") for name in ("work", "whole"))
    close(ended, whole)
    assert ended.trainer_state["best_step"] == whole.trainer_state["best_step"]
    assert_records_close(tmp_path / "work", tmp_path / "whole")


CLOCKS_THAT_DIFFER = """
import os
import sys

from trainer import entrypoint
from trainer.runtime.commands import run_command
from trainer.training import loop

loop.TIME_EVERY_SECONDS = 0.05 if os.environ["RANK"] == "1" else 1e9
sys.exit(run_command(entrypoint.main))
"""


@pytest.mark.parametrize("scheme", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_snapshots_by_time_need_no_equal_clocks(
    batched: Settings, tmp_path: Path, scheme: str
) -> None:
    """It is time in the second process alone, and both gather the sharded state."""
    settings = batched | {"grad_accum": 1, "parallel": scheme, "save_every": 1000}
    done = run_script(CLOCKS_THAT_DIFFER, settings, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list((tmp_path / "work").glob("ckpt_time_*.pt"))


VERTEX = {
    "cluster": {
        "workerpool0": ["cmle-training-workerpool0-ab-0:2222"],
        "workerpool1": [
            "cmle-training-workerpool1-ab-0:2222",
            "cmle-training-workerpool1-ab-1:2222",
        ],
    },
    "environment": "cloud",
    "task": {"type": "workerpool1", "index": 1},
}


def test_the_cluster_environment_of_vertex() -> None:
    assert find_nodes({"CLUSTER_SPEC": json.dumps(VERTEX)}) == Nodes(
        count=3, index=2, master="cmle-training-workerpool0-ab-0", port=2222
    )
    assert find_nodes({}) == Nodes()
    for broken in ("{", "[]", '{"cluster": {}}', '{"cluster": {"a": []}, "task": {"type": "b"}}'):
        with pytest.raises(UsageError, match="CLUSTER_SPEC cannot be understood"):
            find_nodes({"CLUSTER_SPEC": broken})


def test_an_incomplete_environment_of_torchrun_is_named() -> None:
    with (
        pytest.raises(UsageError, match="environment of torchrun is incomplete: 'RANK'"),
        joined_processes({"LOCAL_RANK": "0"}),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_the_gpus_it_was_asked_to_have(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EXPECTED_GPUS, "1")
    message = r"torch can use 0 GPUs here, but this machine should have 1 \(EXPECTED_GPUS\); check"
    with pytest.raises(DeviceError, match=message):
        entrypoint.run_on_all_gpus(settings)
    with pytest.raises(DeviceError, match=message), joined_processes({EXPECTED_GPUS: "1"}):
        pass
    with pytest.raises(DeviceError, match=message):
        choose_precision(TrainConfig())
    for none in ("0", "", "many"):
        assert count_gpus({EXPECTED_GPUS: none}) == 0
