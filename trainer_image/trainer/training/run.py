"""A training run from its settings to its end."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.metadata import build_meta, run_settings_of, targets_of
from trainer.checkpoints.names import FINAL
from trainer.checkpoints.sidecar import Sidecar
from trainer.checkpoints.snapshots import Snapshots, read_from
from trainer.data.streams import streams_for
from trainer.metrics.lines import METRICS
from trainer.models.hugging_face import load_tokenizer
from trainer.models.teacher import TeacherSpec
from trainer.runtime.ahead import Ahead
from trainer.runtime.devices import choose_device, wake
from trainer.runtime.errors import CheckpointError, UsageError
from trainer.runtime.log import JSON, log, log_format, log_values, seconds_since_start
from trainer.runtime.near_names import near_name
from trainer.runtime.processes import Processes, find_nodes, launch_if_needed
from trainer.settings.accumulation import accumulation, with_accumulation
from trainer.settings.config import (
    AUTO,
    REQUIRED,
    SETTINGS,
    TrainConfig,
    changed_settings,
    check_shapes,
    require,
)
from trainer.settings.hf_token import ENVIRONMENT_NAMES, find_hf_token
from trainer.settings.layers import DEFAULT, Resolved, resolve
from trainer.settings.values import as_text
from trainer.targets.checks import check_vocabulary
from trainer.targets.shards import Index
from trainer.training.compile_cache import CompileCache
from trainer.training.loop import TrainingLoop
from trainer.training.micro_batch import resolve_micro_batch
from trainer.training.precision import choose_precision, compiler_errors
from trainer.training.progress import RunResult
from trainer.training.run_header import begin_record
from trainer.training.start import (
    Start,
    check_tokens,
    check_vocabularies,
    from_own_snapshot,
    from_scratch,
    new_phase,
    restarts,
)
from trainer.training.teaching import check_targets, load_teaching, teacher_spec, with_targets

_IMPORTED_LATER = ("torch._dynamo", "transformers.modeling_utils", "torch._inductor.compile_fx")
"""What a run will need and takes seconds to import: the optimizer, the teacher, the compiler."""

_SPARE = 1 << 20
"""Bytes of metadata left for what only the training tells, such as its metrics."""


def run(
    command_line: Mapping[str, Any],
    config_file: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
) -> RunResult | None:
    """Train with settings as from the command line; None when there is nothing to train.

    Args:
        command_line: setting names and values, as `settings_from_args` gives them.
        config_file: settings of a lower precedence.
        processes: this process among those of the run; alone by default.

    Raises:
        LiquidError: anything that a user can act on.
    """
    processes = processes or Processes(device=choose_device())
    by_user = _given_by_user(command_line, config_file or {}, processes)
    imported = seconds_since_start()
    wake(processes.device)
    workdir = by_user.values["local_workdir"]
    snapshots = Snapshots(by_user.values["output_gcs_uri"] or workdir, workdir)
    dry = by_user.values["train_steps"] == 0 and by_user.given("train_steps")
    own = None if dry else _own_snapshot(snapshots, processes)
    foreign = None
    if own is None and by_user.values["resume_gcs_uri"]:
        read = partial(read_from, by_user.values["resume_gcs_uri"], snapshots.workdir)
        foreign = Ahead("checkpoint", read).importing(_IMPORTED_LATER)
    resolved = with_accumulation(_over_checkpoint(by_user, own, foreign), processes.world_size)
    resolved, index = with_targets(resolved)
    config = resolved.config
    if own is not None:
        _check_same_run(config, own)
        _check_same_targets(config, own, index)
    log_values(f"imported in {imported:.1f} s", import_seconds=imported)
    _log_settings(resolved, every=dry)
    _check_metric(config)
    if own is not None and _is_done(own, config):
        if processes.main:
            snapshots.mend()
        log.info("nothing to do: %s is at step %d of %d", own.source, own.step, config.train_steps)
        return _finished(own, config)
    token = find_hf_token(config)
    if index is not None and processes.main:
        check_targets(index, resolved, token)
    source = index or teacher_spec(config, token)
    start = _start(resolved, own, foreign, source, token)
    if config.train_steps == 0:
        log.info("--train_steps=0: settings resolved and checkpoint read, nothing trained")
        return None
    if own is None and start.step >= config.last_step:
        raise UsageError(
            f"--stop_at={config.stop_at} is not past step {start.step}, where {start.source} is;"
            " give a later one"
        )
    _check_metadata(config, start, index)
    return _train(resolved, start, source, snapshots, token, processes)


def _given_by_user(
    command_line: Mapping[str, Any], config_file: Mapping[str, Any], processes: Processes
) -> Resolved:
    """The settings before any checkpoint gives some, refused where no checkpoint can mend them."""
    # The start time may be part of a location: one for all processes
    by_user = resolve(command_line, config_file, now=processes.broadcast(time.time()))
    check_before_reading(by_user)
    if not by_user.values["resume_gcs_uri"]:
        accumulation(by_user, processes.world_size)  # a checkpoint's batch size is checked later
    for name in ("local_workdir", "output_gcs_uri"):
        if "$(" in str({**config_file, **command_line}.get(name)):
            words = "--%s is %s for this start; to go on after a stop, give that, not the date"
            log.warning(words, name, by_user.values[name])
    return by_user


def _log_settings(resolved: Resolved, *, every: bool) -> None:
    """One line a setting: of each where lines are kept, else of those that are not as usual."""
    lines = list(resolved.lines() if every or log_format() == JSON else resolved.differing_lines())
    for line in lines:
        log.info(line)
    if usual := len(resolved.values) - len(lines):
        log.info("%d other settings have their defaults; %s will have all", usual, METRICS)


def _is_done(own: Checkpoint, config: TrainConfig) -> bool:
    """Whether a run has come to its end, or at least to where this start of it pauses."""
    if own.source.rpartition("/")[2] == FINAL or own.step > config.last_step:
        return True
    # A stop may have saved the step before it was evaluated
    pausing = own.step == config.last_step < config.train_steps
    return pausing and own.meta.get("metrics_step") == own.step


def _start(
    resolved: Resolved,
    own: Checkpoint | None,
    foreign: Checkpoint | None,
    source: TeacherSpec | Index | None,
    token: str | None,
) -> Start:
    """Where the run starts, with a student whose vocabulary fits that of what it is taught by.

    Raises:
        CheckpointError, ModelError, UsageError: a checkpoint and the settings do not fit together.
    """
    config, targets = resolved.config, source.made if isinstance(source, Index) else None

    def tokenizer_size() -> int:
        return len(load_tokenizer(config.pretrained, token))

    if own is not None:
        start = from_own_snapshot(resolved, own)
    elif foreign is not None:
        start = new_phase(resolved, foreign)
    else:
        start = from_scratch(resolved, targets.vocabulary if targets else tokenizer_size())
    size, name = start.student.config.vocab_size, config.resume_gcs_uri or "student"
    if targets is not None:
        check_vocabulary(targets, size, name)
        return start
    # Before a data set is tokenized; a token stream tells its own vocabulary
    unknown = foreign is not None and not config.tokens_dir
    rows = source.vocab_size if isinstance(source, TeacherSpec) else None
    check_vocabularies(size, tokenizer_size() if unknown else None, rows, name)
    return start


def check_before_reading(by_user: Resolved) -> None:
    """Check of the user's settings what can be told before a checkpoint is read.

    Raises:
        UsageError: one is missing, or no student has these shapes.
    """
    require(by_user.values, *REQUIRED)
    if not by_user.values["resume_gcs_uri"]:
        check_shapes(by_user.values)


def _check_metadata(config: TrainConfig, start: Start, index: Index | None) -> None:
    """What every snapshot says of the run must be readable again.

    Raises:
        UsageError: it is too large, or a setting has a text that is not Unicode.
    """
    metrics = {
        f"val_{kind}_{who}@{context}": 1 / 3
        for context in (*config.contexts, config.context)
        for kind in ("loss", "ppl")
        for who in ("student", "teacher")
    }
    meta = build_meta(
        config,
        start.student.config,
        step=start.step,
        trained_positions=start.trained_positions,
        metrics=metrics,
        metrics_step=start.step,
        origin=start.origin,
        tokens=start.tokens,
        targets=None if index is None else index.fingerprint,
    )
    try:
        Sidecar(FINAL, 0, "", meta).dump(spare=_SPARE)
    except CheckpointError as error:
        raise UsageError(f"the settings cannot be kept with a checkpoint: {error}") from None


def _train(
    resolved: Resolved,
    start: Start,
    source: TeacherSpec | Index | None,
    snapshots: Snapshots,
    token: str | None,
    processes: Processes,
) -> RunResult:
    config = resolved.config
    if processes.main:
        snapshots.check_writable()
    precision = choose_precision(config, processes.device)
    compile_cache = CompileCache(config, precision, snapshots, start.compiled)
    # The first process of a machine makes what the others then find
    streams = streams_for(config, token) if processes.local_rank == 0 else None
    processes.barrier()
    streams = streams or streams_for(config, token)
    check_tokens(start, streams.info.fingerprint)
    check_vocabularies(
        start.student.config.vocab_size,
        streams.info.vocab_size,
        None,
        config.resume_gcs_uri or "student",
    )
    teacher, targets = load_teaching(
        source, config, streams, precision, token, processes, compile_cache.use
    )
    if config.micro_batch == AUTO:
        layout = None if targets is None else targets.made.layout
        config = resolve_micro_batch(config, start.student, teacher, precision, processes, layout)
    training = TrainingLoop(
        config, start, teacher, streams, precision, snapshots, processes, targets, compile_cache
    )
    if processes.main:
        taught_by = teacher or targets
        training.recorder = begin_record(
            resolved, config, start, taught_by, streams, snapshots, processes
        )
    with compiler_errors():
        return training.run()


def _over_checkpoint(
    by_user: Resolved, own: Checkpoint | None, foreign: Checkpoint | None
) -> Resolved:
    """The user's settings over those of the checkpoint that the run starts from, if any."""
    if foreign is not None:
        return _without_spent_schedules(by_user.with_checkpoint(foreign.settings), foreign)
    if own is None:
        return by_user
    try:
        return by_user.with_checkpoint(run_settings_of(own.meta))
    except CheckpointError as error:
        raise CheckpointError(
            f"{own.source}: {error}, so it is no run to go on with; give another --output_gcs_uri"
            " or --local_workdir"
        ) from None


def _check_same_run(config: TrainConfig, own: Checkpoint) -> None:
    """A run goes on with the settings that define it.

    Raises:
        UsageError: naming every one of them that was given another value.
    """
    changed = changed_settings(own.meta["settings"], config.run_settings())
    if changed:
        raise UsageError(
            f"{config.uri} holds another run ({', '.join(changed)}); give another"
            " --output_gcs_uri or --local_workdir, or the run's own settings to go on with it"
        )
    origin = (own.meta.get("origin") or {}).get("checkpoint", "scratch")
    if config.resume_gcs_uri and config.resume_gcs_uri != origin:
        log.warning(
            "%s goes on with its own run, which started from %s, not from --resume_gcs_uri=%s",
            config.uri,
            origin,
            config.resume_gcs_uri,
        )


def _check_same_targets(config: TrainConfig, own: Checkpoint, index: Index | None) -> None:
    """A run goes on with its own targets, or with the teacher if it began with that.

    Raises:
        UsageError: naming both.
    """
    before, now = targets_of(own.meta), None if index is None else index.fingerprint
    if before != now:
        words = [
            "the teacher itself" if one is None else f"the targets of fingerprint {one}"
            for one in (before, now)
        ]
        raise UsageError(
            f"{config.uri} holds a run from {words[0]}, not from {words[1]}; give"
            f" {'--teacher_targets with those' if before else 'no --teacher_targets'}, or another"
            " --output_gcs_uri or --local_workdir"
        )


def _without_spent_schedules(resolved: Resolved, checkpoint: Checkpoint) -> Resolved:
    """Without the schedules of a phase behind, where the new phase counts its steps from 0."""
    spent = [name for name in ("alpha_schedule", "temp_schedule") if name in checkpoint.settings]
    if not spent or not restarts(resolved, checkpoint):
        return resolved
    log.info(
        "%s of the checkpoint's phase end with it: alpha goes on from %g, T from %g",
        " and ".join(spent),
        resolved.values["alpha"],
        resolved.values["T"],
    )
    dropped = [name for name in spent if not resolved.given(name)]
    return resolved.changed({name: SETTINGS[name].default for name in dropped}, DEFAULT)


def _own_snapshot(snapshots: Snapshots, processes: Processes) -> Checkpoint | None:
    """The newest snapshot of the run itself; the main process chooses, all read the same one."""
    own = None
    if processes.main:
        own = Ahead("checkpoint", snapshots.newest).importing(_IMPORTED_LATER)
    source = processes.broadcast(own.source if own is not None else None)
    if source is not None and own is None:
        own = read_from(source, snapshots.workdir)
    return own


def _check_metric(config: TrainConfig) -> None:
    """``--save_best_on`` must be one of the student's metrics of this run."""
    known = config.student_metrics
    if config.save_best_on not in known:
        near = near_name(config.save_best_on, known)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(known)}"
        raise UsageError(
            f"--save_best_on={config.save_best_on!r} is not evaluated in this run; {hint}"
        )


def _finished(own: Checkpoint, config: TrainConfig) -> RunResult:
    state = own.trainer_state
    return RunResult(
        own.step,
        dict(own.meta.get("metrics") or {}),
        float(state.get("best_value", "inf")),
        int(state.get("best_step", -1)),
    ).checked(config)


def launch(settings: Mapping[str, Any]) -> bool:
    """As `launch_if_needed`, with a run's settings as from the command line.

    Any process of the machine can read a command line, so a token goes into the environment.
    """
    flags = [
        f"--{name}={as_text(name, value)}"
        for name, value in settings.items()
        if not SETTINGS[name].metadata["secret"]
    ]
    token = settings.get("hf_token_value")
    if token and not any(os.environ.get(name) for name in ENVIRONMENT_NAMES):
        return launch_if_needed("trainer.entrypoint", flags, secrets={"HF_TOKEN": token})
    return launch_if_needed("trainer.entrypoint", flags)


def run_on_all_gpus(settings: Mapping[str, Any]) -> RunResult | None:
    """Train on every GPU of the job: in this process where it is one, else through torchrun.

    Returns:
        What came of the run; None on machines other than the first, which alone reports.

    Raises:
        UsageError: ``train_steps`` is 0.
        LiquidError: the run failed.
    """
    if settings.get("train_steps") == 0:
        raise UsageError("--train_steps=0 trains nothing; a stage needs at least 1 update")
    if launch(settings):
        if find_nodes().index:
            return None
        config = resolve(settings, {}).config
        own = Snapshots(config.uri, config.local_workdir).newest()
        assert own is not None, "the run has written its final checkpoint"
        return _finished(own, config)
    return run(settings)
