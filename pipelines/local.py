"""Run the whole pipeline on this machine, on embedded text: no cloud, hub, Docker or GPU.

    python -m pipelines.local                       # or: make run-local
    PARAMS="continue_train_steps=160" python -m pipelines.local

Tasks run one after another in the kfp local runner. A task whose inputs are as in an earlier run is
taken from the cache, so a changed parameter of one stage reruns that stage and what follows. Each
run has a directory ``work/runs/NAME`` with its parameters, its log and what its stages wrote;
``RUN=NAME`` gives the name, which is else the time and the parameters given.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import psutil
from kfp import local

import components
import trainer
from pipelines.anneal import build_pipeline
from pipelines.compile import Build
from pipelines.embedded import build_corpus, build_teacher
from pipelines.local_runs import LOG, PARAMETERS, name_of_run, open_run
from pipelines.parameters import check_parameters, parameter_defaults, parse_parameters
from pipelines.pins import with_revisions
from pipelines.settings import LOCAL_IMAGE, Settings
from pipelines.spec import compiled, titles_of
from pipelines.stages import CACHED, STAGES
from pipelines.submit import switch
from trainer import report
from trainer.metrics.evaluated import METRICS_JSON
from trainer.metrics.lines import METRICS
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError
from trainer.runtime.log import FORMAT, JSON, log, quiet_libraries, set_up_logging
from trainer.runtime.messages import duration
from trainer.runtime.signals import GRACE_SECONDS, ending_first
from trainer.settings.flags import OneLineParser

STUDENT = {"d_model": 96, "n_layers": 3, "n_heads": 4, "eval_max_tokens": 16_384}
DEMO: dict[str, Any] = {
    "teacher": CACHED,
    "target_workers": 1,
    "dataset_config": "",
    "eval_ctx_lens": "64,128",
    "anneal_block_size": 64,
    "anneal_train_steps": 240,
    "anneal_warmup_steps": 24,
    "anneal_lr_peak": 3e-3,
    "anneal_alpha_schedule": "0:0.7,80:0.5,160:0.3",
    "anneal_temp_schedule": "0:1.2,160:1.0",
    "anneal_grad_accum": 2,
    "anneal_eval_every": 80,
    "anneal_save_every": 120,
    "anneal_log_interval": 40,
    "anneal_more_settings": STUDENT,
    "continue_block_size": 128,
    "continue_train_steps": 120,
    "continue_warmup_steps": 12,
    "continue_lr_peak": 1.5e-3,
    "continue_alpha_schedule": "0:0.5,40:0.4,80:0.3",
    "continue_grad_accum": 1,
    "continue_eval_every": 40,
    "continue_save_every": 60,
    "continue_log_interval": 20,
    "continue_more_settings": {"eval_max_tokens": 16_384},
}
"""The default runs, at a fifth of their length or less and an eighth of their context.

The teacher runs once, for a second run to show what that saves. Its targets are one shard, which is
the work of one.
"""

_stopping = threading.Event()
"""Set once this process is told to end."""
_END_SECONDS = GRACE_SECONDS + 2.0
"""How long a training has to save and to end before it is killed."""
_EXECUTING = re.compile(r"Executing task '(?P<task>[\w-]+)'")
_FINISHED = re.compile(r"Task '(?P<task>[\w-]+)' finished with status (?P<status>\w+)")
_CACHED = re.compile(r"Task '?(?P<task>[\w-]+)'? cache hit")
_COLOR = re.compile(r"\x1b\[\d+m")
_QUIET = re.compile(r" = .*\((default|command line|checkpoint|--config)\)$")


@dataclass
class LocalRun:
    """The result of a run of the pipeline."""

    titles: Collection[str]
    """Of the stages that there are to run, in order."""
    ran: list[str] = field(default_factory=list)
    """Titles of the stages that ran, in the order in which they first ended."""
    directory: Path = Path()
    """Of its parameters, its log and what its stages wrote."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """The pipeline's outputs; of the annealing: ``report``, ``table``, ``before``, ``after``."""

    @property
    def cached(self) -> list[str]:
        """Titles of the stages taken from an earlier run."""
        return [title for title in self.titles if title not in self.ran]


def titles_for(parameters: Mapping[str, Any]) -> list[str]:
    """Of the stages that run here with all of the pipeline's parameters."""
    return [s.title for s in STAGES.values() if s.runs_with(parameters) and not s.setting]


class _Readable(io.TextIOBase):
    """Turns the runner's output into progress lines; all of it goes to a log file as it is."""

    def __init__(self, shown: TextIO, raw: TextIO, run: LocalRun) -> None:
        self.shown, self.raw, self.run = shown, raw, run
        self.titles: dict[str, str] = {}
        """By the runner's name of a task, its stage's title."""
        self._rest = ""
        self.last_error = ""
        self._traceback_indent: int | None = None
        self._gone: set[str] = set()
        self._began: dict[str, float] = {}
        """By the runner's name of a task that runs: when it started."""
        self.last = ""
        """Title of the stage that ended last."""

    def write(self, text: str) -> int:
        if _stopping.is_set():
            raise SystemExit  # the runner's thread, before it starts what comes next
        self._observe(self.raw.write, text, "the log file")
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(_COLOR.sub("", line).rstrip())
        return len(text)

    def flush(self) -> None:
        """Nothing: what is shown is flushed line by line, the log file when it is closed."""

    def _show(self, line: str) -> None:
        if self.run.directory != Path():  # which has been told, and is in most paths
            line = line.replace(f"{self.run.directory}/", "")
        self._observe(partial(print, file=self.shown, flush=True), line, "the standard output")

    def _observe(self, write: Callable[[str], object], text: str, name: str) -> None:
        """Write to what is not the run; a failure is told once and does not end it."""
        try:
            write(text)
        except (OSError, ValueError) as error:
            if name not in self._gone:
                self._gone.add(name)
                log.warning("%s cannot be written any more: %s", name, error)

    def _line(self, indented: str) -> None:
        line = indented.strip()
        indent = len(indented) - len(indented.lstrip())
        if line.startswith("Traceback (most recent call last)"):
            self._traceback_indent = indent
        elif line and indent == self._traceback_indent:
            self._traceback_indent = None  # after the frames: what was raised
            ours = line.startswith("trainer.runtime.errors.")
            self.last_error = line.partition(": ")[2] if ours else line
        elif match := _FINISHED.search(line):
            self._finished(match["task"], match["status"].lower())
        elif match := _EXECUTING.search(line):
            self._began[match["task"]] = time.monotonic()
            self._show(f"── {self._title(match['task'])}: started")
        elif match := _CACHED.search(line):
            self._show(f"── {self._title(match['task'])}: taken from the cache")
        elif line.startswith('{"severity"'):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record["severity"] == "ERROR":
                    self.last_error = record["message"].splitlines()[-1]
                if not _QUIET.search(record["message"]):
                    self._show(f"   {record['message']}")

    def _title(self, task: str) -> str:
        return self.titles.get(task, task)

    def _finished(self, task: str, status: str) -> None:
        self.last = self._title(task)
        if self.last not in self.run.ran:
            self.run.ran.append(self.last)
        took = time.monotonic() - self._began.pop(task, time.monotonic())
        self._show(f"── {self.last}: {status} after {duration(took)}")


def run_pipeline(
    work: Path,
    parameters: dict[str, Any],
    directory: Path | None = None,
    build: Build = build_pipeline,
    titles: Collection[str] = (),
) -> LocalRun:
    """Run the pipeline in the kfp local runner with its cache.

    Args:
        work: of all local runs, which share its ``cache``.
        parameters: of the pipeline, over its defaults.
        directory: of `open_run`; a new one by default.
        build: makes the pipeline.
        titles: of its stages; those of the annealing by default.

    Raises:
        LiquidError: a task failed; names it and its message.
    """
    code = code_digest()
    directory = directory or open_run(work, parameters, code)
    titles = titles or titles_for(parameter_defaults() | parameters)
    run = LocalRun(titles, directory=directory)
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(directory),
        enable_caching=switch("CACHE", default=True),
        cache_root=str(work / "cache"),
    )
    log_file = directory / LOG
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        raw = log_file.open("a", encoding="utf-8")
        stack.callback(_close, raw)
        stack.enter_context(_lines_as_json())
        warnings.simplefilter("ignore")
        stream = _Readable(sys.stdout, raw, run)
        stack.enter_context(_cache_hits_to(stream))
        try:
            # The image's name is part of the cache's key, so changed code is not taken from it
            settings = Settings(trainer_image=f"{LOCAL_IMAGE}:{code}")
            with contextlib.redirect_stdout(stream):
                pipeline = build(settings, "local")
                stream.titles = titles_of(compiled(pipeline))
                run.outputs = dict(pipeline(**parameters).outputs)
        except RuntimeError as error:
            failed = stream.last or "the pipeline"
            reason = stream.last_error or _COLOR.sub("", str(error))
            raise LiquidError(f"{failed} failed: {reason} (all output: {log_file})") from None
        except (KeyboardInterrupt, SystemExit):
            print(
                "started again, the stages that have finished come from the cache; the one that"
                " was running starts over",
                file=sys.stderr,
            )
            raise
    return run


@contextlib.contextmanager
def _cache_hits_to(stream: _Readable) -> Iterator[None]:
    """Let the runner's word of what it takes from the cache arrive, which it logs but shows nobody.

    It logs everything else where it prints too.
    """
    root, handler = logging.getLogger(), logging.StreamHandler(stream)
    handler.addFilter(lambda record: bool(_CACHED.search(record.getMessage())))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


@contextlib.contextmanager
def _lines_as_json() -> Iterator[None]:
    """Let what the tasks log be told from what else they print."""
    before = os.environ.get(FORMAT)
    os.environ[FORMAT] = JSON
    try:
        yield
    finally:
        os.environ.pop(FORMAT)
        if before is not None:
            os.environ[FORMAT] = before


def _close(file: TextIO) -> None:
    with contextlib.suppress(OSError):
        file.close()


def code_digest() -> str:
    """A digest of all code that the stages run, and of the templates of their reports."""
    digest = hashlib.sha256()
    for package in (trainer, components):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.*")):
            if path.suffix == ".pyc" or not path.is_file():
                continue
            name = path.relative_to(root).as_posix()
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def ending_tasks() -> contextlib.AbstractContextManager[None]:
    """End the running task together with this process, on SIGTERM and on Ctrl-C.

    The task's process gets neither by itself, but for a Ctrl-C typed in a terminal.
    """
    return ending_first(_end_children, _kill_children, seconds=_END_SECONDS + 3.0)


def _end_children() -> None:
    _stopping.set()
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    psutil.wait_procs(children, timeout=_END_SECONDS)
    _kill(children)


def _kill_children() -> None:
    _kill(psutil.Process().children(recursive=True))


def _kill(children: list[psutil.Process]) -> None:
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def main(argv: list[str]) -> None:
    """The command line."""
    parser = OneLineParser("python -m pipelines.local", description=__doc__)
    parser.add_argument("work", type=Path, nargs="?", default=Path("work"))
    work = parser.parse_args(argv).work.resolve()
    set_up_logging()
    quiet_libraries()
    with ending_tasks():
        run_here(work)


def run_here(work: Path) -> None:
    """Build what the demonstration needs, run it with ``PARAMS``, and print its table."""
    parameters = parse_parameters(os.environ.get("PARAMS", ""))
    check_parameters(DEMO | parameters)
    started, name = time.monotonic(), name_of_run(parameters)
    places = {"teacher_name": str(work / "teacher"), "dataset_name": str(work / "corpus")}
    every = with_revisions(DEMO | places | parameters, parameter_defaults())
    directory = open_run(work, every, code_digest(), name=name, given=os.environ.get("RUN", ""))
    log.info("run in %s: all parameters in %s, all output in %s", directory, PARAMETERS, LOG)
    if parameters:
        log.info("given: %s", ", ".join(f"{name}={value}" for name, value in parameters.items()))
    corpus = build_corpus(work / "corpus")
    build_teacher(work / "teacher", corpus, workdir=work / "teacher-run")
    run = run_pipeline(work, every, directory)
    phases = [str(Path(run.outputs[name].path).parent / METRICS) for name in ("before", "after")]
    evaluation = Path(run.outputs["report"].path).with_name(METRICS_JSON)
    print("", *report.stage_lines(phases, str(evaluation)), sep="\n")
    print(f"\nfrom the cache   {', '.join(run.cached) or 'nothing'}")
    print(f"annealed         {run.outputs['before'].path}")
    print(f"continued        {run.outputs['after'].path}")
    print(f"report           {run.outputs['report'].path}")
    print(f"as text          {run.outputs['table'].path}")
    print(f"run              {directory}")
    print(f"took             {duration(time.monotonic() - started)}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
