"""A stop at any moment of any command: its status, one line, and the next start goes on.

A sweep through every command is printed as a table. ``make soak`` runs the long one: at every half
second of a command's course, or every `SWEEP_SECONDS`, and through a training's last save. With
`SWEEP_PARTS`, a sweep is divided among as many tests, which ``pytest -n`` runs side by side.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.proxy import FaultProxy
from tests.faults.server import ObjectServer
from tests.interrupts import with_interrupts
from tests.trainer.storage.test_locations import mounted, needs_namespaces
from trainer import entrypoint
from trainer.checkpoints.snapshots import read_sidecars
from trainer.runtime.log import FORMAT
from trainer.runtime.signals import GRACE_SECONDS
from trainer.storage.places import open_location

Settings = dict[str, Any]

EVERY = float(os.environ.get("SWEEP_SECONDS", "0.5"))
PARTS = int(os.environ.get("SWEEP_PARTS", "1"))


def begin(door: str, *argv: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return begin_with([*before, sys.executable, "-m", f"trainer.{door}", *argv])


def begin_with(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        preexec_fn=with_interrupts,
    )


def flags(settings: Settings) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def messages(errors: str) -> list[str]:
    """Of every line, which must be one of the log."""
    return [json.loads(line)["message"] for line in errors.splitlines()]


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


# ── the sweep


@pytest.fixture
def commands(
    settings: Settings, tmp_path: Path, trained: str, corpus: Path
) -> dict[str, Callable[[int], list[str]]]:
    """By door, its arguments; a number gives it an output of its own."""
    evaluated = {
        name: value
        for name, value in settings.items()
        if name in ("teacher_name", "dataset_name", "cache_dir", "local_workdir")
    } | {"eval_ctx_lens": "16,32", "eval_max_tokens": 4000}
    prepared = {name: settings[name] for name in ("teacher_name", "dataset_name", "local_workdir")}
    work = f"--local_workdir={settings['local_workdir']}"
    run = settings | {"train_steps": 200, "save_every": 50, "eval_every": 100}
    return {
        "entrypoint": lambda n: flags(run | {"output_gcs_uri": str(tmp_path / f"run-{n}")}),
        "prepare_tokens": lambda n: [str(tmp_path / f"tokens-{n}"), *flags(prepared)],
        "evaluate": lambda n: [str(tmp_path / f"metrics-{n}"), trained, *flags(evaluated)],
        "export_hf": lambda n: [trained, str(tmp_path / f"model-{n}"), work],
        "sample": lambda n: [trained, "--prompt=if", "--max_new_tokens=8", "--with_teacher", work],
        "resize_reset": lambda n: [trained, str(tmp_path / f"r-{n}.pt"), "--block_size=64", work],
        "pick_best": lambda n: [str(Path(trained).parent)],
    }


@pytest.fixture
def trained(settings: Settings, tmp_path: Path) -> str:
    """A small run's best checkpoint."""
    entrypoint.run(settings | {"local_workdir": str(tmp_path / "source")})
    return str(tmp_path / "source" / "best.pt")


class Sweep:
    """Stops of one command after another; each start is the next one of the stop before it."""

    def __init__(self, door: str, arguments: Callable[[int], list[str]]) -> None:
        self.door, self.arguments = door, arguments
        self.output = 0
        self.rows: list[tuple[float, str, int, float]] = []

    def stop_after(self, seconds: float) -> bool:
        """Start, stop after a while, and look at what is left; whether it had come to its end."""
        process = begin(self.door, *self.arguments(self.output))
        try:
            _, errors = process.communicate(timeout=seconds)
            took = 0.0
        except subprocess.TimeoutExpired:
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=90)
            took = time.monotonic() - began
        said = messages(errors)
        status = process.returncode
        told = [message for message in said if message.startswith("stopped by SIGTERM")]
        self.rows.append((seconds, phase_of(said), status, took))
        where = f"{self.door} after {seconds:.1f} s: {status}\n{errors[-3000:]}"
        if status == -signal.SIGTERM:  # before Python had read this program
            assert said == [], where
        elif status == 143:
            assert len(told) == 1, where
        else:
            assert (status, told) == (0, []), where
            self.output += 1
        return status == 0

    def finish(self) -> None:
        """The start after the last stop comes to the end."""
        process = begin(self.door, *self.arguments(self.output))
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
        messages(errors)

    def table(self) -> str:
        lines = [f"{self.door}: after, phase, status, seconds to exit"]
        lines += [f"  {t:5.1f} s  {what:45} {s:4d} {took:6.2f}" for t, what, s, took in self.rows]
        return "\n".join(lines)


def phase_of(said: list[str]) -> str:
    """What the log told last before the stop."""
    quiet = [
        message
        for message in said
        if not message.startswith(("stopped by", "SIGTERM:")) and " = " not in message
    ]
    settings = any(" = " in message for message in said)
    return (quiet[-1] if quiet else "settings" if settings else "before the log")[:45]


DOORS = ["entrypoint", "prepare_tokens", "evaluate", "export_hf", "resize_reset", "pick_best"]
DOORS += ["sample"]


@pytest.mark.parametrize("door", DOORS)
def test_stops(door: str, commands: dict[str, Callable[[int], list[str]]]) -> None:
    sweep = Sweep(door, commands[door])
    for seconds in (0.4,) if door != "entrypoint" else (0.4, 6.0):
        sweep.stop_after(seconds)
    sweep.finish()


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("door", DOORS)
def test_stops_all_along(
    door: str, part: int, commands: dict[str, Callable[[int], list[str]]]
) -> None:
    """Up to a command's end, at most for 30 seconds; each part takes every so many stops one."""
    sweep = Sweep(door, commands[door])
    seconds, ended = EVERY * (part + 1), 0
    while seconds <= 30.0 and ended < 2:
        ended += sweep.stop_after(seconds)
        seconds += EVERY * PARTS
    sweep.finish()
    print(f"\n{sweep.table()}")
    assert any(status == 143 for _, _, status, _ in sweep.rows)


def stop_in_last_save(
    settings: Settings, bucket: str, proxy: FaultProxy, delays: list[float]
) -> list[tuple[float, str, int, float]]:
    """Stop while the end of a training is on its way through a slow link."""
    rows = []
    for number, delay in enumerate(delays):
        argv = flags(settings | {"output_gcs_uri": f"{bucket}/run-{number}"})
        process = begin("entrypoint", *argv)
        read_until(process, '"step 6/6')
        time.sleep(delay)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=90)
        took, status = time.monotonic() - began, process.returncode
        said = messages(errors)
        rows.append((delay, phase_of(said), status, took))
        told = [message for message in said if message.startswith("stopped by SIGTERM")]
        assert (status, len(told)) in ((143, 1), (0, 0)), errors
        again = begin("entrypoint", *argv)
        _, errors = again.communicate(timeout=240)
        assert again.returncode == 0, errors
        names = {sidecar.name for sidecar in read_sidecars(open_location(f"{bucket}/run-{number}"))}
        assert {"final.pt", "best.pt"} <= names
    return rows


def test_a_stop_in_the_last_save(
    settings: Settings, gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    gcs_proxy.bandwidth = 400_000
    ((_, _, status, _),) = stop_in_last_save(settings, gcs_bucket, gcs_proxy, [0.5])
    assert status == 143


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_stops_all_through_the_last_save(
    settings: Settings, gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    gcs_proxy.bandwidth = 400_000
    delays = [EVERY / 5 * number for number in range(30)]
    for row in stop_in_last_save(settings, gcs_bucket, gcs_proxy, delays):
        print("last save + {:4.1f} s  {:45} {:4d} {:6.2f}".format(*row))


# ── while the first documents are tokenized


def with_large_corpus(settings: Settings, texts: list[str], directory: Path) -> Settings:
    """With a data set that takes some seconds, and no cache."""
    source = directory / "large"
    source.mkdir()
    line = json.dumps({"text": "\n".join(texts)})
    for name, lines in (("train", 60), ("validation", 1)):
        (source / f"{name}.jsonl").write_text(f"{line}\n" * lines)
    return settings | {"dataset_name": str(source), "cache_dir": str(directory / "cache")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("door", ["entrypoint", "prepare_tokens"])
def test_a_stop_while_documents_are_tokenized(
    door: str, number: signal.Signals, settings: Settings, texts: list[str], tmp_path: Path
) -> None:
    """Where a library's callback swallows what a handler raises."""
    large = with_large_corpus(settings, texts, tmp_path)
    if door == "prepare_tokens":
        large = {n: large[n] for n in ("teacher_name", "dataset_name", "local_workdir")}
    output = [str(tmp_path / "tokens")] if door == "prepare_tokens" else []
    process = begin(door, *output, *flags(large))
    while not list(tmp_path.rglob("train.bin")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert messages(errors)[-1] in ("stopped by SIGTERM", "interrupted")
    assert "training from step" not in errors


# ── a storage server that does not answer


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    server = ObjectServer(tmp_path)
    server.make_bucket("stalled")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    yield server
    server._process.send_signal(signal.SIGCONT)
    server.close()


WITH_GRACE = """
import runpy, sys
from trainer.runtime import signals

signals.GRACE_SECONDS = float(sys.argv.pop(1))
runpy.run_module("trainer.entrypoint", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("signals", "grace"),
    [(1, 3.0), (2, GRACE_SECONDS), pytest.param(1, GRACE_SECONDS, marks=pytest.mark.soak)],
)
def test_a_storage_that_stalls_does_not_keep_the_process(
    signals: int, grace: float, settings: Settings, own_server: ObjectServer
) -> None:
    stalled = settings | {"output_gcs_uri": "gs://stalled/run", "train_steps": 100_000}
    stalled |= {"save_every": 100_000, "eval_every": 100_000, "log_interval": 1}
    process = begin_with([sys.executable, "-c", WITH_GRACE, str(grace), *flags(stalled)])
    read_until(process, '"step 3/100000')
    own_server._process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    if signals == 2:
        read_until(process, "saving step")
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 143, errors
    (line,) = [text for text in messages(errors) if text.startswith("stopped by SIGTERM")]
    assert "is not saved" in line or "not at gs://stalled/run yet: ckpt_step_" in line


# ── observers


@pytest.mark.parametrize("shown", [b"step 4/200", b"tokenizing train:  "])
def test_a_terminal_that_goes_away_does_not_end_the_run(
    shown: bytes, settings: Settings, texts: list[str], tmp_path: Path
) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # a bar needs a width
    settings |= {"train_steps": 200, "eval_every": 200, "save_every": 200}
    if b"tokenizing" in shown:
        settings = with_large_corpus(settings | {"train_steps": 2}, texts, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.entrypoint", *flags(settings)],
        stderr=theirs,
        stdout=theirs,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", FORMAT: ""},
    )
    os.close(theirs)
    seen = b""
    while shown not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert (Path(str(settings["local_workdir"])) / "final.pt").exists()


@pytest.mark.parametrize("how", ["closed", "gone", "full"])
def test_a_log_that_cannot_be_written_does_not_end_the_run(how: str, settings: Settings) -> None:
    command = [sys.executable, "-m", "trainer.entrypoint", *flags(settings)]
    if how != "gone":
        shell = 'exec "$@" 2>&- >&-' if how == "closed" else 'exec "$@" 2>/dev/full >/dev/full'
        done = subprocess.run(["sh", "-c", shell, "sh", *command], timeout=120)
        status = done.returncode
    else:
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert process.stderr is not None
        process.stderr.readline()
        process.stderr.close()
        status = process.wait(timeout=120)
    assert status == 0
    assert (Path(str(settings["local_workdir"])) / "final.pt").exists()


@needs_namespaces
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_scalars_that_cannot_be_written_do_not_end_the_run(
    how: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = tmp_path / "board"
    board.mkdir()
    monkeypatch.setenv("AIP_TENSORBOARD_LOG_DIR", str(board))
    mount = {
        "full": f"mount -t tmpfs -o size=4k none {board}",
        "read-only": f"mount --bind {board} {board} && mount -o remount,ro,bind {board}",
    }[how]
    long = settings | {"train_steps": 40, "log_interval": 1, "eval_every": 20}
    process = begin("entrypoint", *flags(long), before=mounted(mount))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    said = [text for text in messages(errors) if "TensorBoard scalars are not recorded" in text]
    assert len(said) == 1
