"""Search the settings of the annealing: many short trainings, ranked, and the winner's ``PARAMS``.

    make search GRID=examples/search.yaml                     # here, on embedded text
    make search BACKEND=vertex GRID=… PROJECT=… PIPELINE_ROOT=gs://… TRAINER_IMAGE=…
    make search BACKEND=kfp GRID=… HOST=http://… PIPELINE_ROOT=gs://… TRAINER_IMAGE=…

    prepare → teacher targets (one task a worker) → join targets → trials (one task each) → rank

Tokens and the teacher's targets are made once. With rungs, the better part of the trials goes on
from each, every trial from its own snapshots. Beside ``GRID`` everything is as for
`pipelines.submit` and `pipelines.local`: ``PARAMS`` give what all trials have in common.
"""

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kfp import dsl

from components.keep_trials import keep_trials
from components.rank_trials import rank_trials
from components.train_trial import train_trial
from pipelines.anneal import BACKENDS, at_a_time, made_targets, prepared, task_maker
from pipelines.embedded import build_corpus, build_teacher
from pipelines.estimates.plan import plan_of_run
from pipelines.estimates.stages import estimate
from pipelines.estimates.text import rough_duration
from pipelines.grid import NAME, OF_THE_TOKENS, STAGE, Search, described, read_search
from pipelines.local import DEMO, LocalRun, code_digest, ending_tasks, run_pipeline
from pipelines.local_runs import LOG, PARAMETERS, name_of_run, open_run
from pipelines.parameters import (
    check_cloud_parameters,
    check_data_set,
    parameter_defaults,
    parse_parameters,
)
from pipelines.pins import with_revisions
from pipelines.settings import Settings, load_settings
from pipelines.stages import CACHED, STAGES, Stage
from pipelines.submit import (
    Switches,
    ready_for_vertex,
    require_kfp,
    submit_kfp,
    submit_vertex,
    switch,
)
from trainer.runtime.commands import run_command
from trainer.runtime.errors import UsageError
from trainer.runtime.log import log, quiet_libraries, set_up_logging
from trainer.runtime.messages import duration
from trainer.settings.flags import OneLineParser

TRIALS = "search-trials"
"""Where trials lie, below the root of the pipeline's artifacts."""


class Outputs(NamedTuple):
    """The pipeline's outputs: the ranking, and the winner's ``PARAMS``."""

    report: dsl.HTML
    table: dsl.Markdown
    ranking: dsl.Artifact
    winner: dsl.Artifact


def search_stages(search: Search) -> dict[str, Stage]:
    """By key, in the order in which they run."""
    picking, training = (STAGES[key].machine for key in ("pick", STAGE))
    stages = [STAGES["prepare"]]
    if search.needs_targets:
        stages += [STAGES["targets"], STAGES["join"]]
    rungs = len(search.grid.rungs)
    for rung in range(1, rungs + 2):
        of_rung = f"-of-rung-{rung}" if rung <= rungs else ""
        title = f"trials{of_rung}"
        stages.append(
            Stage(f"trials{rung}", title, training, shares_machine_of=STAGE, fans_out=True)
        )
        if rung <= rungs:
            title = f"keep{of_rung}"
            stages.append(Stage(f"keep{rung}", title, picking, shares_machine_of="pick"))
    stages.append(Stage("rank", "rank-trials", picking, shares_machine_of="pick"))
    return {stage.key: stage for stage in stages}


def build_search(search: Search, settings: Settings, backend: str) -> Any:
    """The pipeline of a search for a backend, its image and machines put in.

    What is tried are parameters; how many rungs there are and how many trials run at a time are
    part of the pipeline.

    Args:
        search: what there is to train.
        settings: image and machines.
        backend: see `pipelines.anneal.build_pipeline`.

    Raises:
        UsageError: machines that the backend would refuse, or could not give.
    """
    if backend == "vertex":
        settings.check_vertex()
    if backend == "kfp":
        settings.check_kubeflow()
    if settings.machines[STAGE].replicas > 1:
        raise UsageError(
            f"{STAGE.upper()}_REPLICAS={settings.machines[STAGE].replicas}: a trial runs on one"
            " machine; leave it out, and give the grid a higher parallelism"
        )
    stage = task_maker(settings, backend, search_stages(search))

    @dsl.pipeline(name=NAME, description="Try settings in short trainings and rank them")
    def try_and_rank(
        teacher_name: str,
        teacher_revision: str,
        dataset_name: str,
        dataset_config: str,
        dataset_revision: str,
        text_column: str,
        hf_secret_name: str,
        eval_ctx_lens: str,
        metric: str,
        shares: list[str],
        trials: list[str],
        common: dict,
        trials_uri: str,
        parameters: dict,
    ) -> Outputs:
        given = dict(locals())
        streams = prepared(stage, given)
        every: dict[str, Any] = {"tokens": streams, "common": common, "trials_uri": trials_uri}
        every["hf_secret_name"] = hf_secret_name
        if search.needs_targets:
            joined = made_targets(stage, backend, streams, shares, given)
            # In the local runner a loop takes an artifact, but no parameter, of another task
            every["targets"] = joined["targets"]
        together = at_a_time(backend, search.grid.parallelism)
        ranking = _climb(stage, search, trials, every, together)
        ranked = stage("rank", rank_trials)(metric=metric, parameters=parameters, **ranking)
        return Outputs(**{name: ranked.outputs[name] for name in Outputs._fields})

    return try_and_rank


def _climb(
    stage: Callable[[str, Any], Callable[..., Any]],
    search: Search,
    trials: Any,
    every: Mapping[str, Any],
    parallelism: int,
) -> dict[str, Any]:
    """The tasks of all rungs and of the last stretch; returns what is ranked.

    Args:
        stage: makes tasks.
        search: with the rungs.
        trials: their texts.
        every: inputs of every trial.
        parallelism: trials that run at a time.
    """
    rungs = search.grid.rungs
    before: dict[str, Any] = {}
    for number, stop_at in enumerate((*rungs, 0), start=1):
        name = f"rung-{number}" if stop_at else "trials"
        with dsl.ParallelFor(trials, name=name, parallelism=parallelism) as trial:
            outcome = stage(f"trials{number}", train_trial)(
                trial=trial, stop_at=stop_at, **every
            ).outputs["outcome"]
        before["outcomes"] = dsl.Collected(outcome)
        if stop_at:
            kept = stage(f"keep{number}", keep_trials)(keep=search.grid.keep, **before)
            trials, before = kept.outputs["Output"], {"before": kept.outputs["standings"]}
    return before


def arguments(search: Search, trials_uri: str) -> dict[str, Any]:
    """The parameters of the search's pipeline.

    Args:
        search: what there is to train.
        trials_uri: where trials have their locations.
    """
    of_teacher = ("teacher_name", "teacher_revision", "hf_secret_name", "eval_ctx_lens")
    names = (*of_teacher, "text_column", *OF_THE_TOKENS)
    return {name: search.base[name] for name in names} | {
        "metric": search.metric,
        "shares": search.shares if search.needs_targets else [],
        "trials": [trial.dump() for trial in search.trials],
        "common": search.common,
        "trials_uri": trials_uri,
        "parameters": search.parameters,
    }


def summary(search: Search) -> str:
    """What there is to train, in a few lines."""
    controls = sum(one.get("alpha") == 0.0 for one in search.settings)
    tried = len(search.settings) - controls
    steps = search.common["train_steps"]
    rungs = ", ".join(str(step) for step in search.grid.rungs)
    lines = [
        f"{len(search.trials)} trials: {tried} settings and {controls} of cross entropy alone,"
        f" times {len(search.seeds)} seeds; {steps} updates each"
        + (f", of which {search.grid.keep:g} go on from each of the rungs {rungs}" if rungs else "")
    ]
    return "\n".join([*lines, *(f"  {described(one)}" for one in search.settings)])


def forecast(search: Search, settings: Settings, backend: str) -> str:
    """How long a trial takes and what it costs, by the estimate of an annealing; in a few lines.

    Args:
        search: what there is to train.
        settings: machines, region and the file of prices.
        backend: ``vertex`` or ``kfp``.

    Raises:
        UsageError: the file of prices is wrong.
    """
    values = {
        **search.base,
        "teacher": CACHED,
        f"{STAGE}_train_steps": search.common["train_steps"],
    }
    plan = plan_of_run(settings, values, backend, cache=True)
    found = estimate(replace(plan, stages=[(STAGE, "trial")]))
    (trial,) = found.stages
    seconds, price, count = trial.seconds(), trial.price(), len(search.trials)
    lines = [f"a trial on {trial.machine} is {trial.known}"]
    if seconds is not None:
        each, every = (rough_duration(n * seconds.fixed) for n in (1, count))
        if price is not None:
            money = plan.prices.currency
            each += f" and {price.fixed:.2f} {money}"
            every += f" and {count * price.fixed:.2f} {money}"
        lines = [
            f"a trial takes {each} on {trial.machine} ({trial.known}); all {count} to their end"
            f" take {every} together; tokens and the teacher's targets are not estimated"
        ]
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def run_here(work: Path, path: str) -> None:
    """Build what the demonstration needs, search in the local runner, and print the ranking.

    Args:
        work: for everything that is made; shared with `pipelines.local`.
        path: of the grid.
    """
    own = parse_parameters(os.environ.get("PARAMS", ""))
    places = {"teacher_name": str(work / "teacher"), "dataset_name": str(work / "corpus")}
    base = with_revisions(DEMO | places | own, parameter_defaults())
    search = read_search(path, base, own)
    print(summary(search))
    if switch("DRY_RUN"):
        return
    started, name = time.monotonic(), name_of_run({"search": Path(path).stem} | own)
    directory = open_run(work, arguments(search, str(work / TRIALS)), code_digest(), name=name)
    log.info("run in %s: all parameters in %s, all output in %s", directory, PARAMETERS, LOG)
    corpus = build_corpus(work / "corpus")
    build_teacher(work / "teacher", corpus, workdir=work / "teacher-run")
    outputs = search_here(work, search, directory).outputs
    print(f"\n{Path(outputs['table'].path).read_text()}")
    print(f"report           {outputs['report'].path}")
    print(f"ranking          {outputs['ranking'].path}")
    print(f"run              {directory}")
    print(f"took             {duration(time.monotonic() - started)}\n")
    winner = Path(outputs["winner"].path).read_text()
    print(f"the winner in the whole pipeline:\nmake run-local PARAMS={shlex.quote(winner)}")


def search_here(work: Path, search: Search, directory: Path | None = None) -> LocalRun:
    """Run a search in the kfp local runner.

    Args:
        work: of all local runs.
        search: what there is to train.
        directory: of `open_run`; a new one by default.

    Raises:
        LiquidError: a task failed; names it and its message.
    """
    titles = [stage.title for stage in search_stages(search).values()]
    given = arguments(search, str(work / TRIALS))
    return run_pipeline(work, given, directory, partial(build_search, search), titles)


def submit(backend: str, path: str) -> None:
    """Submit a search to Vertex AI or to open-source Kubeflow Pipelines.

    Raises:
        UsageError: something is missing or makes no sense.
        LiquidError: it could not be sent, or, with ``WAIT=1``, the run failed.
    """
    settings, switches = load_settings(), Switches()
    own = parse_parameters(os.environ.get("PARAMS", ""))
    check_cloud_parameters(own)
    check_data_set(own)
    known = parameter_defaults()
    base = with_revisions(own, known, hub=True, defaults=known)
    search = read_search(path, base, own, settings.processes(backend)[STAGE])
    host = os.environ.get("HOST", "")
    if backend == "vertex":
        looked_at = [STAGE, "targets"] if search.needs_targets else [STAGE]
        asked = {**search.base, "teacher": CACHED}
        tasks = {STAGE: min(search.grid.parallelism, len(search.trials))}
        settings = ready_for_vertex(settings, asked, switches, looked_at, tasks)
    else:
        require_kfp(settings, host, "pipeline_root")
    if not settings.pipeline_root.startswith("gs://"):
        raise UsageError(
            f"PIPELINE_ROOT={settings.pipeline_root!r}: trials go on from the snapshots at their"
            " addresses there; give gs://BUCKET/PREFIX"
        )
    given = arguments(search, f"{settings.pipeline_root.rstrip('/')}/{TRIALS}")
    build = partial(build_search, search)

    def expected() -> str:
        return f"{summary(search)}\n{forecast(search, settings, backend)}"

    if backend == "vertex":
        submit_vertex(settings, given, switches, build, NAME, expected)
    else:
        submit_kfp(settings, given, host, switches, build, NAME, expected)


def main(argv: list[str]) -> None:
    """The command line: where to search; the rest comes from the environment."""
    parser = OneLineParser("python -m pipelines.search", description=__doc__)
    parser.add_argument("backend", choices=BACKENDS, nargs="?", default="local")
    parser.add_argument("work", type=Path, nargs="?", default=Path("work"))
    args = parser.parse_args(argv)
    path = os.environ.get("GRID", "")
    set_up_logging()
    if args.backend != "local":
        submit(args.backend, path)
        return
    quiet_libraries()
    with ending_tasks():
        run_here(args.work.resolve(), path)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
