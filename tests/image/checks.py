"""What is looked at in the image, each part with its lines of output."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kfp import dsl

from pipelines.grid import read_search
from pipelines.search import arguments, build_search
from tests.image import stops
from tests.image.digests import digests
from tests.image.engine import Engine, Mount, last_line
from tests.image.inputs import parameters_at
from tests.image.stages import Here, Run, Site, Task, compiled_for, start_container
from trainer.runtime.errors import LiquidError, UsageError
from trainer.runtime.messages import duration

OUTPUTS = (
    ("prepare", "tokens", "directory"),
    ("teacher-targets", "targets", "directory"),
    ("anneal", "checkpoints", "directory"),
    ("resize-and-reset", "resized", "checkpoint"),
    ("continue", "checkpoints", "directory"),
    ("evaluate", "metrics", "losses"),
    ("export", "exported", "directory"),
)
"""What must be equal everywhere: title of the stage, its output, and how that is read."""
WORDS_OF_TRAINING = "training from step"
WITHOUT_LM_EVAL = "lm-eval cannot be used here"
"""What the stage says, whose library is not in the image."""
SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "eval_max_tokens": 600}
GRID = """
settings: {lr_peak: [1e-3, 2e-3]}
seeds: [1, 2]
rungs: [40]
train_steps: 100
parallelism: 2
max_trials: 8
"""
_OF_TRIAL = re.compile(r"_[0-9a-f]{12}(?=/)")
"""The end of a trial's name, which tells trials of other teachers apart."""
Places = dict[str, tuple[str, list[str]]]
"""By a name, how something is read, and where it lies; see `tests.image.digests`."""


class Failures:
    """What went wrong; printed where it is found."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, what: str) -> None:
        """Take note of a failure and print it."""
        self.found.append(what)
        print(f"  FAILED: {what}", flush=True)


def heading(text: str) -> None:
    """Begin a part of the output."""
    print(f"\n{text}", flush=True)


def start_up(engine: Engine, image: str, failures: Failures) -> None:
    """Print how long a container takes to start, and with what the stages import."""
    heading("start-up, in a hardened container")
    for label, command in (
        ("container alone", ["true"]),
        ("python, torch", ["python", "-c", "import torch"]),
        ("trainer --help", ["python", "-m", "trainer.entrypoint", "--help"]),
    ):
        started = start_container(engine, image, command)
        if started.end():
            failures.add(f"{label}: {last_line(started.said)}")
        print(f"  {label:<22}{time.monotonic() - started.began:>8.1f} s", flush=True)
    entry = engine.must("image", "inspect", "--format={{json .Config.Entrypoint}}", image)
    started = start_container(engine, image, [*json.loads(entry), "--block_size=no"])
    status = started.end()
    print(f"  {'entrypoint, bad value':<22}{status:>8}     {last_line(started.said)[:60]}")
    if status != 2 or len(started.lines) != 1:
        failures.add(f"a bad value ends the entrypoint with {status}: {started.said[-300:]}")


def run_pipeline(
    site: Site, spec: dict[str, Any], parameters: dict[str, Any], work: Path, failures: Failures
) -> Run | None:
    """Run a pipeline at a site, a line of output for each stage; None: a stage failed."""
    out = sys.stdout

    def show(task: Task) -> None:
        status = "ok" if task.status == 0 else f"status {task.status}"
        first = task.started.lines[0][0] if task.started.lines else task.seconds
        begun = task.started.seconds_to(WORDS_OF_TRAINING)
        trains = f"   trains after {begun:.1f} s" if begun else ""
        line = f"  {site.name:<8}{task.title:<22}{status:<11}{task.seconds:>6.1f} s"
        print(f"{line}   first line {first:>4.1f} s{trains}", file=out, flush=True)

    run = Run(site, spec, work / f"logs-{site.name}", show)
    started = time.monotonic()
    try:
        run.to_end(parameters)
    except LiquidError as error:
        failures.add(f"{site.name}: {error}")
        return None
    took = duration(time.monotonic() - started)
    print(f"  {site.name:<8}{'all of it':<22}{'ok':<11}{took:>8}", flush=True)
    return run


def run_left_out(run: Run, failures: Failures) -> None:
    """The stages that the pipeline leaves out with these parameters."""
    online = run.alone("comp-no-targets", {})
    if online.status:
        failures.add(f"{online.site}: {online.title}: {last_line(online.started.said)}")
    exported = run.task("export").output("exported")
    given = {"model": dsl.Model(name="exported", uri=exported), "tasks": "lambada_openai"}
    tasks = run.alone("comp-lm-eval-tasks", given)
    said = tasks.started.messages[-1]
    print(f"  {'':<8}{said[:100]}…", flush=True)
    if tasks.status != UsageError.exit_status or not said.startswith(WITHOUT_LM_EVAL):
        failures.add(f"{tasks.site}: {tasks.title} ended with {tasks.status}: {said}")


def search_at(site: Site, image: str, work: Path, failures: Failures) -> dict[str, dict[str, str]]:
    """Run a search at a site; the digests of its trials, none where a stage failed."""
    grid = work / "grid.yaml"
    grid.write_text(GRID, encoding="utf-8")
    own = parameters_at(site.inputs) | {"resume_gcs_uri": "", "anneal_more_settings": SHAPE}
    search = read_search(str(grid), own, own)
    trials = site.seen({"uri": f"{site.root}/trials"})["uri"]
    spec = compiled_for(site.backend, image, work, partial(build_search, search))
    run = run_pipeline(site, spec, arguments(search, trials), work, failures)
    if run is None:
        return {}
    found = digests_at(site, {"trials": ("directory", [trials])})["trials"]
    return {"trials": {_OF_TRIAL.sub("", name): digest for name, digest in found.items()}}


def places_of(run: Run) -> Places:
    """By stage and output: how it is read, and where it lies."""
    found = {}
    for title, output, kind in OUTPUTS:
        uris = [task.output(output) for task in run.tasks if task.title == title]
        found[f"{title}: {output}"] = (kind, uris)
    return found


def digests_at(site: Site, places: Places) -> dict[str, dict[str, str]]:
    """The digests of what lies at a site, read there.

    Raises:
        LiquidError: it cannot be read.
    """
    if isinstance(site, Here):
        return digests(places)
    program, result = "/digests.py", site.root / "digests.json"
    result.unlink(missing_ok=True)
    own = Mount(Path(__file__).with_name("digests.py"), program)
    # A job's small files are written through the mount, which a bucket would have too
    places = {
        name: (kind, [uri.replace("gs://", "/gcs/") for uri in uris] if kind == "losses" else uris)
        for name, (kind, uris) in places.items()
    }
    told = site.seen({"outputFile": str(result)})["outputFile"]
    reading = site.start(["python", program, json.dumps(places), told], {}, own)
    if reading.end():
        raise LiquidError(f"{site.name}: {last_line(reading.said)}")
    found: dict[str, dict[str, str]] = json.loads(result.read_text(encoding="utf-8"))
    return found


def compare(found: dict[str, dict[str, dict[str, str]]], failures: Failures) -> None:
    """Print whether all sites have the same digests.

    Args:
        found: by site and output, the digests by file.
        failures: where differences go.
    """
    if not found:
        return
    heading(f"results, equal to the bit: {', '.join(found)}")
    first, *others = found
    for name, here in found[first].items():
        differing = []
        for site in others:
            there = found[site].get(name, {})
            files = [file for file in {**here, **there} if here.get(file) != there.get(file)]
            differing += [f"{file} at {site}" for file in files]
        shown = next(iter(here.values()), "nothing")[:12]
        count = f"{len(here):>3} file{'s' if len(here) != 1 else ''}"
        print(f"  {name:<32}{count:<10}{shown}…", flush=True)
        if differing or not here:
            failures.add(f"{name} differs: {', '.join(differing[:5]) or 'nothing is there'}")


def stop_and_compare(
    run: Run, ways: Sequence[tuple[str, stops.WayToStop]], failures: Failures
) -> None:
    """Stop the annealing in each way; print what came of it and of the start after it."""
    task = run.task("anneal")
    unbroken = task.output("checkpoints")
    made = []
    for when, way in ways:
        log = run.logs / f"stopped {when}.log"
        try:
            made.append(stops.stop_and_go_on(run.site, task, when, way, log))
        except LiquidError as error:
            failures.add(f"{run.site.name}, {when}: {error}")
    ended = {stop.when: stop.checkpoints for stop in made if not stop.wrong}
    wanted: Places = {
        name: ("checkpoint", [f"{place}/final.pt"])
        for name, place in {**ended, "unbroken": unbroken}.items()
    }
    found = digests_at(run.site, wanted)
    for stop in made:
        same = found.get(stop.when) == found["unbroken"]
        said = stop.last_words.partition(";")[0]
        shown = f"status {stop.status} after {stop.seconds:.1f} s: {said}"
        went_on = stop.went_on.rpartition("/")[2] or "from its beginning"
        print(f"  {stop.site:<8}{stop.when:<22}{shown}", flush=True)
        print(f"  {'':<30}again: status {stop.again}, {went_on}, {'same' if same else 'OTHER'}")
        if stop.wrong or not same:
            failures.add(f"{stop.site}, {stop.when}: {stop.wrong or 'it ends with other weights'}")
