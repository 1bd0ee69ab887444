"""The compiled command of every stage, for a backend, and how it is started in the image.

kfp's own local orchestrator goes over the compiled pipeline: conditions, loops and artifacts are
its work. What it would start as a process of this machine, a `Site` starts where the stage belongs.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import os
import re
import signal as signals
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml
from google.protobuf import json_format
from kfp import local
from kfp.local import (
    pipeline_orchestrator,
    subprocess_task_handler,
    task_dispatcher,
    utils,
)
from kfp.local.config import LocalExecutionConfig
from kfp.local.status import Status
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec

from pipelines.anneal import build_pipeline
from pipelines.compile import Build, compile_to
from pipelines.settings import load_settings
from pipelines.spec import titles_of
from tests.image.engine import Engine, Mount, last_line, new_name
from trainer.runtime.devices import EXPECTED_GPUS
from trainer.runtime.errors import LiquidError
from trainer.runtime.log import FORMAT, JSON

ROOT = Path(__file__).parents[2]
BUCKET = "bucket"
INPUTS = "/inputs"
"""Where kfp's containers see the inputs; those of Vertex AI find them at ``gs://``."""
STORAGE = "http://127.0.0.1:4443"
_POOLS = "worker_pool_specs"
_OF_PLATFORM = re.compile(r"\{\{\$\.pipeline_(google_cloud|persistent)_\w+\}\}")
"""What Vertex AI fills in for launchers: project, region and a kept machine."""
_LONGEST = 600.0
"""Seconds after which a stage is killed; each takes some."""


# ── where stages run ──────────────────────────────────────────────────────────────────────────────


class Site(Protocol):
    """Where the commands of a backend's stages run, and what they see there."""

    name: str
    backend: str
    root: Path
    """Of the pipeline's outputs, on this machine."""
    inputs: str
    """Where a stage finds the inputs."""

    def seen(self, executor_input: dict[str, Any]) -> dict[str, Any]:
        """What kfp's executor is told, with places as a stage sees them."""

    def start(self, command: list[str], environment: Mapping[str, str], *mounts: Mount) -> Started:
        """Start a command as the first process of a stage, with mounts beside its own."""


class Started:
    """A stage that runs. Its log is read line by line as it comes."""

    def __init__(
        self,
        command: list[str],
        stop: Callable[[str], None] | None = None,
        runs: Callable[[], bool] = lambda: True,
        **how: Any,
    ) -> None:
        self.runs = runs
        """Whether its first process has been started."""
        self.began = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        """Seconds since the start, and what was said then."""
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
        )
        self._stop = stop
        self._watch = threading.Timer(_LONGEST, self._give_up)
        self._watch.daemon = True
        self._watch.start()

    def stop(self, signal: str = "TERM") -> None:
        """Send a signal to its first process."""
        if self._stop:
            self._stop(signal)
        else:
            self._process.send_signal(getattr(signals, f"SIG{signal}"))

    def _give_up(self) -> None:
        with contextlib.suppress(LiquidError):
            self.stop("KILL")

    def __iter__(self) -> Iterator[str]:
        """Its lines, to its end; a second loop goes on behind the first."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic() - self.began, line.rstrip()))
            yield line

    def end(self) -> int:
        """Wait for its end; returns its status."""
        for _ in self:
            pass
        status = self._process.wait()
        self._watch.cancel()
        return status

    @property
    def said(self) -> str:
        """All of its output."""
        return "\n".join(line for _, line in self.lines)

    @property
    def messages(self) -> list[str]:
        """What the log says, line by line; other lines as they are."""
        found = []
        for _, line in self.lines:
            try:
                found.append(str(json.loads(line)["message"]))
            except (ValueError, KeyError, TypeError):
                found.append(line)
        return found

    def seconds_to(self, text: str) -> float | None:
        """Seconds from the start to the first line with a text in it; None: it has not come."""
        return next((seconds for seconds, line in self.lines if text in line), None)


@dataclass
class Here:
    """The compiled commands in processes of this machine, without a container."""

    root: Path
    inputs: str
    name: str = "here"
    backend: str = "kfp"

    def seen(self, executor_input: dict[str, Any]) -> dict[str, Any]:
        """See `Site.seen`."""
        return executor_input

    def start(self, command: list[str], environment: Mapping[str, str], *mounts: Mount) -> Started:
        """See `Site.start`."""
        own = {
            "PYTHONPATH": f"{ROOT}:{ROOT / 'trainer_image'}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        return Started(command, env=os.environ | environment | own)


@dataclass
class Cluster:
    """Open-source Kubeflow Pipelines: containers without any network, places are mounted."""

    engine: Engine
    image: str
    root: Path
    host_inputs: Path
    name: str = "kfp"
    backend: str = "kfp"
    inputs: str = INPUTS

    def seen(self, executor_input: dict[str, Any]) -> dict[str, Any]:
        """See `Site.seen`."""
        return executor_input

    def start(self, command: list[str], environment: Mapping[str, str], *mounts: Mount) -> Started:
        """See `Site.start`."""
        own = [Mount(self.host_inputs, INPUTS), Mount(self.root, str(self.root), writable=True)]
        return start_container(
            self.engine, self.image, command, mounts=[*own, *mounts], environment=environment
        )


@dataclass
class CustomJobs:
    """Vertex AI: artifacts are at ``gs://``, small files of a stage go to the mount ``/gcs``.

    The only network is the loopback that a container of the storage has.
    """

    engine: Engine
    image: str
    mount: Path
    """What stands in for the mount of the bucket."""
    storage: str
    """The container of the storage."""
    name: str = "vertex"
    backend: str = "vertex"
    inputs: str = f"gs://{BUCKET}/inputs"
    root: Path = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.mount / "root"

    def seen(self, executor_input: dict[str, Any]) -> dict[str, Any]:
        """See `Site.seen`."""
        return _replaced(executor_input, str(self.mount), f"gs://{BUCKET}", f"/gcs/{BUCKET}")

    def read_back(self, output: Path) -> None:
        """Let kfp find on this machine what a stage says to be at ``gs://``."""
        written = json.loads(output.read_text(encoding="utf-8"))
        back = _replaced(written, f"gs://{BUCKET}", str(self.mount), "")
        output.unlink()  # it is another user's
        output.write_text(json.dumps(back), encoding="utf-8")

    def start(self, command: list[str], environment: Mapping[str, str], *mounts: Mount) -> Started:
        """See `Site.start`."""
        return start_container(
            self.engine,
            self.image,
            command,
            network=f"container:{self.storage}",
            mounts=[Mount(self.mount, f"/gcs/{BUCKET}", writable=True), *mounts],
            environment={**environment, "STORAGE_EMULATOR_HOST": STORAGE},
        )


def start_container(engine: Engine, image: str, command: list[str], **how: Any) -> Started:
    """A command as the first process of a hardened container; see `Engine.run_command`."""
    name = new_name()
    words = engine.run_command(image, command, name=name, **how)
    return Started(words, partial(engine.signal, name), partial(engine.runs, name))


def _replaced(value: Any, mount: str, uri: str, path: str, key: str = "") -> Any:
    """Places of this machine as a stage's: of artifacts as URIs, of files as paths."""
    if isinstance(value, dict):
        return {name: _replaced(inner, mount, uri, path, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, mount, uri, path, key) for inner in value]
    if isinstance(value, str) and key in ("uri", "outputFile"):
        return value.replace(mount, uri if key == "uri" else path)
    return value


# ── the compiled pipeline ─────────────────────────────────────────────────────────────────────────


def compiled_for(
    backend: str, image: str, directory: Path, build: Build = build_pipeline
) -> dict[str, Any]:
    """The pipeline as ``make compile`` writes it, whose custom jobs are started by kfp.

    The launcher of a custom job is a program of Vertex AI's: it sends the job, whose container it
    leaves as it is. Here that container takes its place.
    """
    settings = load_settings(
        {"TRAINER_IMAGE": image, "PIPELINE_ROOT": f"gs://{BUCKET}/root", "SETTINGS": ""}
    )
    package = compile_to(directory / f"{backend}.yaml", settings, backend, build)
    text = _OF_PLATFORM.sub("the-test", package.read_text(encoding="utf-8"))
    spec: dict[str, Any] = next(iter(yaml.safe_load_all(text)))
    executors = spec["deploymentSpec"]["executors"]
    for component in spec["components"].values():
        inputs = component.get("inputDefinitions", {}).get("parameters", {})
        if _POOLS not in inputs:
            continue
        (pool,) = inputs.pop(_POOLS)["defaultValue"]
        container = dict(pool["container_spec"])
        container["image"] = container.pop("image_uri")
        # Inside of a text of JSON, what the executor is told is escaped once
        told = {"{{$.json_escape[1]}}": "{{$}}"}
        container["args"] = [told.get(word, word) for word in container["args"]]
        executors[component["executorLabel"]] = {"container": container}
    return spec


@dataclass
class Task:
    """A stage that has run."""

    title: str
    site: str
    command: list[str]
    environment: Mapping[str, str]
    told: dict[str, Any]
    """What kfp's executor was told."""
    started: Started
    status: int = -1
    seconds: float = 0.0
    wrote: Mapping[str, Any] = field(default_factory=dict)
    """By name, the artifacts that it says it has written."""

    def output(self, artifact: str) -> str:
        """The URI of an artifact that it has written, as the stage itself says."""
        return str(self.wrote[artifact]["artifacts"][0]["uri"])


def told_to(command: list[str]) -> tuple[int, dict[str, Any]]:
    """Where in a command kfp's executor is told its inputs and outputs, and what they are."""
    at = command.index("--executor_input") + 1
    return at, json.loads(command[at])


@dataclass
class Run:
    """A pipeline's run at a site."""

    site: Site
    spec: dict[str, Any]
    logs: Path
    report: Callable[[Task], None]
    """Called with each task that has ended."""
    tasks: list[Task] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def to_end(self, parameters: dict[str, Any]) -> None:
        """Run it.

        Raises:
            LiquidError: a stage failed; names it and its last line.
        """
        self.site.root.mkdir(parents=True, exist_ok=True)
        self.site.root.chmod(0o777)  # of other users, as a volume is on a cluster
        self.logs.mkdir(parents=True, exist_ok=True)
        with self._in_kfp() as proto:
            try:
                pipeline_orchestrator.run_local_pipeline(proto, parameters)
            except RuntimeError as error:
                failed = [task for task in self.tasks if task.status]
                if not failed:
                    raise LiquidError(f"kfp: {error} (all output: {self.logs})") from error
                last = failed[-1]
                raise LiquidError(
                    f"{last.title} failed with status {last.status}: {last_line(last.started.said)}"
                    f" (all output: {self.log_of(last)})"
                ) from error

    def alone(self, component: str, arguments: dict[str, Any]) -> Task:
        """Run the stage of one component of the pipeline, which this run has left out.

        Args:
            component: its name in the compiled pipeline.
            arguments: values of its parameters, and artifacts.
        """
        with self._in_kfp() as proto:
            specification = proto.components[component]
            executor = proto.deployment_spec["executors"][specification.executor_label]
            task_dispatcher.run_single_task_implementation(
                pipeline_resource_name="alone",
                component_name=component,
                component_spec=specification,
                executor_spec=utils.struct_to_executor_spec(executor),
                arguments=arguments,
                pipeline_root=str(self.site.root),
                runner=LocalExecutionConfig.instance.runner,
                raise_on_error=False,
                block_input_artifact=False,
                unique_pipeline_id="0",
            )
        return self.tasks[-1]

    def task(self, title: str) -> Task:
        """The task of a title that ended last."""
        return next(task for task in reversed(self.tasks) if task.title == title)

    def log_of(self, task: Task) -> Path:
        """Where a task's output is kept."""
        return self.logs / f"{task.title}.log"

    @contextlib.contextmanager
    def _in_kfp(self) -> Iterator[PipelineSpec]:
        """Have kfp's orchestrator start tasks at this run's site; gives what it is to run."""
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(self.site.root))
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((self.logs / "kfp.log").open("a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(log))
            stack.enter_context(warnings.catch_warnings())
            # Tasks of a loop run side by side, and each takes back what it found: indented lines,
            # handlers of the log
            stack.callback(setattr, builtins, "print", builtins.print)
            stack.callback(setattr, logging.root, "handlers", logging.root.handlers[:])
            stack.enter_context(self._handling())
            # It warns of machines, which it does not give
            warnings.simplefilter("ignore")
            yield json_format.ParseDict(self.spec, PipelineSpec())

    @contextlib.contextmanager
    def _handling(self) -> Iterator[None]:
        run = self

        class Handler:
            """What the orchestrator takes for a handler of tasks."""

            def __init__(self, image: str, full_command: list[str], *_: Any, **given: Any) -> None:
                self.command = full_command
                self.environment: dict[str, str] = given.get("env_vars") or {}

            def run(self) -> Status:
                """Run the task; returns whether it succeeded."""
                return run._run(self.command, self.environment)

        before = subprocess_task_handler.SubprocessTaskHandler
        subprocess_task_handler.SubprocessTaskHandler = Handler
        try:
            yield
        finally:
            subprocess_task_handler.SubprocessTaskHandler = before

    def _run(self, command: list[str], environment: dict[str, str]) -> Status:
        at, told = told_to(command)
        own = Path(told["outputs"]["outputFile"])
        title = titles_of(self.spec)[own.parent.name]
        own.parent.mkdir(parents=True, exist_ok=True)
        for directory in (own.parent, *own.parent.parents):
            if directory == self.site.root:
                break
            directory.chmod(0o777)  # this user's, so that another's files in it can be removed
        told = self.site.seen(told)
        command = [*command[:at], json.dumps(told), *command[at + 1 :]]
        # The machine of the pipeline has a GPU, this one is not asked for it
        environment |= {EXPECTED_GPUS: "0", FORMAT: JSON, "OMP_NUM_THREADS": "1"}
        started = self.site.start(command, environment)
        task = Task(title, self.site.name, command, environment, told, started)
        task.status = started.end()
        task.seconds = time.monotonic() - started.began
        if own.exists():
            task.wrote = json.loads(own.read_text(encoding="utf-8")).get("artifacts", {})
            if isinstance(self.site, CustomJobs):
                self.site.read_back(own)
        with self._lock:
            self.tasks.append(task)
            with self.log_of(task).open("a", encoding="utf-8") as log:
                log.write(started.said + "\n")
            self.report(task)
        return Status.FAILURE if task.status else Status.SUCCESS
