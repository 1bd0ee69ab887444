"""Build the trainer image and run every stage's compiled command in it: ``make image-test``.

    FULL=1 SEARCH=1 python -m tests.image     # with the whole lock; a search too

docs/image.md says what it does and what it needs.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import fcntl
import os
import shutil
import time
from pathlib import Path

from pipelines.submit import switch
from tests.image import stops
from tests.image.checks import (
    Failures,
    compare,
    digests_at,
    heading,
    places_of,
    run_left_out,
    run_pipeline,
    search_at,
    start_up,
    stop_and_compare,
)
from tests.image.engine import Engine, Mount, Skipped, find_engine, that_runs, version_of
from tests.image.image import CPU_INDEX, ROOT, Recipe, build, import_base
from tests.image.inputs import make_inputs, parameters_at
from tests.image.stages import (
    BUCKET,
    Cluster,
    CustomJobs,
    Here,
    Run,
    Site,
    compiled_for,
    start_container,
)
from tests.image.storage import storage
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError
from trainer.runtime.log import quiet_libraries, set_up_logging
from trainer.runtime.messages import duration
from trainer.runtime.signals import ending_first
from trainer.settings.flags import OneLineParser

WORK = ROOT / "build" / "image-test"
_END_SECONDS = 20.0
"""In which all containers are killed once this process is told to end."""


def recipe_from_environment() -> Recipe:
    """What to build, from the variables of the command.

    Raises:
        UsageError: ``FULL`` is neither 1 nor 0.
    """
    return Recipe(
        full=switch("FULL"),
        cpu_index=os.environ.get("CPU_INDEX", CPU_INDEX),
        base=os.environ.get("BASE", ""),
        mirror=os.environ.get("MIRROR", ""),
    )


def engine_for(recipe: Recipe, work: Path) -> Engine:
    """The engine that can build it; nothing is changed before this has looked.

    Raises:
        UsageError: an engine or a base that cannot be.
        Skipped: something is missing on this machine.
    """
    engine = find_engine(os.environ.get("ENGINE", ""), work / "store" if recipe.base else None)
    recipe.check(engine)
    return engine


def built(engine: Engine, recipe: Recipe, work: Path) -> Engine:
    """Build the image and say how large it is; returns the engine as it runs containers here."""
    what = "the full lock" if recipe.full else "CPU wheels"
    heading(f"image: unchanged trainer_image/Dockerfile, {what}, {version_of(engine)}")
    if recipe.base:
        started = time.monotonic()
        import_base(engine, recipe, work)
        print(f"  {'base':<22}{duration(time.monotonic() - started):>10}   {recipe.base}")
    started = time.monotonic()
    print(f"  building: {work / 'build.log'}", flush=True)
    build(engine, recipe, work)
    print(f"  {'built':<22}{duration(time.monotonic() - started):>10}")
    print(f"  {'size':<22}{engine.size(recipe.tag) / 1e9:>7.2f} GB")
    for size, made in engine.layers(recipe.tag):
        print(f"    {size:>9}   {made}")
    return that_runs(engine, recipe.tag)


def remove_earlier(engine: Engine, image: str, work: Path) -> None:
    """Remove what an earlier test has left, its containers' files as their own user.

    Raises:
        LiquidError: something cannot be removed.
    """
    for name in ("kfp", "gcs"):
        if (work / name).exists():
            mounts = [Mount(work / name, "/earlier", writable=True)]
            start_container(engine, image, ["find", "/earlier", "-delete"], mounts=mounts).end()
    for name in ("kfp", "gcs", "here", "inputs", "logs-kfp", "logs-vertex", "logs-here"):
        try:
            shutil.rmtree(work / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LiquidError(f"{work / name} cannot be removed: {error}; remove it") from None


def test(engine: Engine, recipe: Recipe, work: Path) -> list[str]:
    """All of it; returns what failed.

    Raises:
        LiquidError: the image cannot be built or run, or its results cannot be read.
    """
    failures = Failures()
    engine = built(engine, recipe, work)
    image, inputs = recipe.tag, work / "inputs"
    remove_earlier(engine, image, work)
    start_up(engine, image, failures)
    make_inputs(inputs)
    here: Site = Here(work / "here", str(inputs))
    kfp: Site = Cluster(engine, image, work / "kfp", inputs)
    heading("stages: uid 12345, group 0, read-only root, no capabilities; kfp without network,")
    print(f"vertex with gs://{BUCKET} at the loopback of fake-gcs-server alone, here uncontained")
    with storage(engine, image, inputs) as container:
        vertex: Site = CustomJobs(engine, image, work / "gcs", container)
        runs: dict[str, Run] = {}
        for site in (kfp, vertex, here):
            spec = compiled_for(site.backend, image, work)
            if run := run_pipeline(site, spec, parameters_at(site.inputs), work, failures):
                runs[site.name] = run
                if site is not here:
                    run_left_out(run, failures)
        compare(
            {name: digests_at(run.site, places_of(run)) for name, run in runs.items()}, failures
        )
        heading("SIGTERM to the annealing, and the same command again")
        stalled = stops.with_storage_stalled(
            lambda: engine.signal(container, "STOP"), lambda: engine.signal(container, "CONT")
        )
        early = [("at the start", stops.at_the_start), ("in training", stops.in_training)]
        for name, saving in (("kfp", stops.while_saving), ("vertex", stalled)):
            if name in runs:
                stop_and_compare(runs[name], [*early, ("while saving", saving)], failures)
        if switch("SEARCH"):
            heading("the stages of make search")
            trials = {s.name: search_at(s, image, work, failures) for s in (kfp, vertex)}
            compare(trials, failures)
    print("\nnot run: register, which needs Vertex AI's model registry")
    return failures.found


def main(argv: list[str]) -> None:
    """The command line; everything else comes from the environment."""
    set_up_logging()
    OneLineParser("python -m tests.image", description=__doc__).parse_args(argv)
    recipe = recipe_from_environment()
    switch("SEARCH")
    quiet_libraries()
    try:
        engine = engine_for(recipe, WORK)
    except Skipped as reason:
        print(f"image-test skipped: {reason}")
        raise SystemExit(reason.exit_status) from None
    WORK.mkdir(parents=True, exist_ok=True)
    lock = (WORK / "lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise LiquidError(f"another image-test runs in {WORK}; wait for its end") from None
    started = time.monotonic()
    with ending_first(engine.end_containers, lambda: None, seconds=_END_SECONDS):
        failed = test(engine, recipe, WORK)
    took = duration(time.monotonic() - started)
    if failed:
        raise LiquidError(
            f"image-test: {len(failed)} failures after {took}; the first: {failed[0]}"
        )
    print(f"\nimage-test passed after {took}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
