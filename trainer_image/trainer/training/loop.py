"""The training loop: updates, evaluations and snapshots from where a run starts to its end."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import Tensor

from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.metadata import build_meta
from trainer.checkpoints.names import (
    BEST,
    FINAL,
    TIME_EVERY_SECONDS,
    best_name,
    step_name,
    time_name,
)
from trainer.checkpoints.snapshots import Snapshots
from trainer.checkpoints.state_copies import StateCopies, gather
from trainer.data.batches import BatchSampler, prefetched
from trainer.data.streams import TokenStreams
from trainer.loss.chunked import Mix
from trainer.metrics.lines import CHECKPOINT, END, EVALUATION, UPDATE
from trainer.metrics.recording import Recorder
from trainer.models.teacher import Teacher
from trainer.runtime.errors import CheckpointError, Preempted, TrainingError
from trainer.runtime.log import ProgressBar, log, log_values, seconds_since_start
from trainer.runtime.messages import duration, one_line, shortened
from trainer.runtime.processes import Processes
from trainer.runtime.signals import saving_on_signals
from trainer.settings.config import TrainConfig
from trainer.settings.schedules import learning_rate
from trainer.targets.reading import Targets
from trainer.training.compile_cache import CompileCache
from trainer.training.evaluation import EvaluationStopped, Evaluator, check_contexts
from trainer.training.log_window import LogWindow
from trainer.training.precision import Precision
from trainer.training.progress import Progress, RunResult
from trainer.training.scalars import ScalarLog
from trainer.training.start import Start
from trainer.training.step import TrainStep

_Batch = tuple[Tensor, Tensor, Tensor | None]
"""Inputs, labels, and records where there are targets: one micro-batch on the host."""


class TrainingLoop:
    """One process's part of a run.

    Args:
        config: with ``grad_accum`` and ``global_batch`` resolved.
        start: student, step and state to start from.
        teacher: None where no update has alpha above 0.
        streams: training and validation tokens.
        precision: device and compute types.
        snapshots: where checkpoints go; only the main process writes.
        processes: this process among those of the run; alone by default.
        targets: in place of a teacher.
        compile_cache: keeps what the run compiles; nothing is kept by default.

    Raises:
        UsageError: a context to evaluate at is longer than the validation split.
        CheckpointError: the optimizer's state does not fit the student.
    """

    def __init__(
        self,
        config: TrainConfig,
        start: Start,
        teacher: Teacher | None,
        streams: TokenStreams,
        precision: Precision,
        snapshots: Snapshots,
        processes: Processes | None = None,
        targets: Targets | None = None,
        compile_cache: CompileCache | None = None,
    ) -> None:
        assert config.grad_accum is not None, "accumulation() was not called"
        check_contexts(config.contexts, config.context, streams, config.eval_max_tokens)
        self.config = config
        self.accumulation = config.grad_accum
        self.processes = processes or Processes(device=precision.device)
        self.precision = precision
        self.snapshots = snapshots
        self.compile_cache = compile_cache
        self.recorder: Recorder | None = None
        """Of the main process, writes the run's record; None: none is written."""
        self.streams = streams
        self.targets = targets
        self.origin = start.origin
        self.trained_positions = start.trained_positions
        self.step = start.step
        self.continued = bool(start.trainer_state)
        self.progress = Progress.load(start.trainer_state)
        if not self.continued:
            self.progress.first_step = start.step
        self.device_step = self._step_of(start, teacher)
        self.student = self.device_step.student
        self.evaluator = Evaluator(
            config,
            streams,
            teacher,
            precision,
            self.processes,
            stopping=lambda: self.stop_signal is not None,
            stored=None if targets is None else targets.losses,
        )
        self.sampler = BatchSampler(
            streams.train,
            block_size=config.context,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            seed=config.seed,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )
        self.alpha, self.temperature = config.schedule_alpha, config.schedule_T
        self.window = LogWindow(precision.device)
        self._shown = ""
        """Of the last log line: what the progress bar shows too."""
        self.window.restore(self.progress.window, self.processes)
        self._counted = start.step
        """Updates that `_count_skipped` has seen."""
        self.copies = StateCopies()
        self.stop_signal: signal.Signals | None = None
        self._next_time_snapshot = time.monotonic() + TIME_EVERY_SECONDS
        self._last_save = time.perf_counter()
        """When the last snapshot was begun."""
        self._saved = start.step if self.continued else -1
        """The step of the newest snapshot at the run's location; -1 where there is none."""
        self._began = start.step
        self._whole = True
        """Whether the weights are those of a complete update."""

    def _step_of(self, start: Start, teacher: Teacher | None) -> TrainStep:
        """The update on the device, with what a run that goes on has of it."""
        try:
            step = TrainStep(
                self.config,
                start.student,
                teacher,
                self.precision,
                self.processes,
                start.optimizer_state,
                None if self.targets is None else self.targets.made.layout,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{start.source}: {error}") from None
        # Empty where the run was on a machine that needed no loss scaling
        if self.precision.loss_scaling and start.trainer_state.get("loss_scale"):
            step.scaler.load_state_dict(start.trainer_state["loss_scale"])
        return step

    def run(self) -> RunResult:
        """Train to ``train_steps`` or ``stop_at`` with evaluations, snapshots and log lines.

        Raises:
            Preempted: a signal stopped the run; its state has been saved.
            TrainingError: too many updates in a row had non-finite gradients, or no evaluation was
                finite.
        """
        began = time.perf_counter()
        self._announce()
        with saving_on_signals(self._on_signal, self._unsaved):
            self._train()
        if self.stop_signal is not None:  # while the end was being saved
            raise self._preempted(self.stop_signal.name)
        best = self.progress.best_value, self.progress.best_step
        took = duration(time.perf_counter() - began)
        ended = "finished" if self.step == self.config.train_steps else "pausing"
        log_values(
            f"{ended} at step {self.step} after {took}: best {self.config.save_best_on}"
            f" {best[0]:.4f} at step {best[1]}; checkpoints in {self.config.uri}",
            finish_seconds=time.perf_counter() - self._last_save,
            run_seconds=seconds_since_start(),
        )
        return RunResult(self.step, self.progress.metrics, *best).checked(self.config)

    def _train(self) -> None:
        """Updates and what is due after them, up to the last snapshot's arrival."""
        main = self.processes.main
        scalars = ScalarLog(self.config.uri, step=self.step, enabled=main)
        bar = ProgressBar("training", "step", self.config.last_step, self.step, shown=main)
        batches = self._batches()
        try:
            self._catch_up(scalars)
            update = self._first_update
            while self.step < self.config.last_step:
                update(batches)
                update = self._update
                bar.update(note=self._shown)
                self._after_update(scalars)
            self.snapshots.finish()
        except Exception as error:  # whatever it is, what was trained is saved first
            if not isinstance(error, Preempted):
                self._rescue(error)
            raise
        finally:
            bar.close()
            self._close_targets()
            batches.close()
            scalars.close()
            if self.recorder is not None:
                self.recorder.close()

    def _announce(self) -> None:
        config = self.config
        log.info(
            "training from step %d to %d at context %d: %d windows per update (%d x %d), %s on %s",
            self.step,
            config.last_step,
            config.context,
            config.global_batch,
            self.accumulation,
            config.micro_batch,
            self.precision.compute,
            self.precision.device,
        )
        for name, schedule in (("alpha", self.alpha), ("T", self.temperature)):
            pending = shortened(schedule.pending(self.step)) or "nothing"
            log.info(
                "%s is %g at step %d, pending: %s", name, schedule.at(self.step), self.step, pending
            )

    # ── one update ────────────────────────────────────────────────────────────────────────────

    def _first_update(self, batches: Iterator[_Batch]) -> None:
        """Log how long start and first update took; a compiling one is left out of the speed."""
        startup_seconds = seconds_since_start()
        began = time.perf_counter()
        self._update(batches)
        if self.precision.device.type == "cuda":
            torch.cuda.synchronize()
        update_seconds = time.perf_counter() - began
        compiled = self.precision.compiles(self.config)
        if compiled:
            self.window.leave_out_updates()
        log_values(
            f"started in {startup_seconds:.1f} s; first update in {update_seconds:.1f} s"
            + ", compilation included" * compiled,
            startup_seconds=startup_seconds,
            first_update_seconds=update_seconds,
        )

    def _update(self, batches: Iterator[_Batch]) -> None:
        """The step's alpha and T, its micro-batches, then clipping and AdamW."""
        mix = Mix(self.alpha.at(self.step), self.temperature.at(self.step), self.config.kd_scheme)
        for micro_step in range(self.accumulation):
            inputs, labels, records = next(batches)
            self._seed_dropout(micro_step)
            last = micro_step == self.accumulation - 1
            output = self.device_step.micro_step(
                inputs, labels, mix, records=records, accumulation=self.accumulation, last=last
            )
            self.window.add(output)
            self._stop_if_alone()
        self._whole = False
        norm = self.device_step.update(self._learning_rate(self.step))
        self.step += 1
        self._whole = True
        self.window.add_norm(norm)
        self._count_skipped(wait=False)

    def _stop_if_alone(self) -> None:
        """Stop in the middle of an update, where there are no others to agree with."""
        if self.stop_signal is not None and self.processes.world_size == 1:
            self._stop()

    def _close_targets(self) -> None:
        """Before the thread that prepares batches ends, which waits for them."""
        if self.targets is not None:
            self.targets.close()

    def _seed_dropout(self, micro_step: int) -> None:
        """Seed by the position in the run, so that a resumed run draws the same masks."""
        if self.config.dropout > 0.0:
            position = (self.config.seed, self.step, micro_step, self.processes.rank)
            torch.manual_seed(hash(position) & 0x7FFF_FFFF_FFFF)

    def _count_skipped(self, *, wait: bool) -> None:
        """Count the updates that were skipped for a non-finite gradient.

        Raises:
            TrainingError: ``max_nonfinite`` of them came in a row.
        """
        for finite in self.device_step.outcomes(wait=wait):
            self._counted += 1
            if finite:
                self.progress.skipped_in_row = 0
                continue
            self.progress.skipped += 1
            self.progress.skipped_in_row += 1
            in_row, step = self.progress.skipped_in_row, self._counted - 1
            log.warning("step %d skipped: its gradient is not finite (%d in a row)", step, in_row)
            if in_row >= self.config.max_nonfinite:
                raise TrainingError(
                    f"{in_row} updates in a row had a non-finite gradient, the last at step {step}"
                    f" with learning rate {self._learning_rate(step):.3g}; {self._advice()}"
                )

    def _advice(self) -> str:
        if self._saved < 0:
            return "no checkpoint had been due. Lower --lr_peak or lengthen --warmup_steps"
        return (
            f"the last good checkpoint, of step {self._saved}, is kept at {self.config.uri}. Start"
            " from it with --resume_gcs_uri at another output, a lower --lr_peak or longer"
            " --warmup_steps"
        )

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self.config.peak_lr,
            warmup_steps=self.config.warmup_steps,
            train_steps=self.config.train_steps,
        )

    def _batches(self) -> Generator[_Batch, None, None]:
        """Micro-batches from this step on; a thread prepares the next ones."""
        gpu = self.precision.device.type == "cuda"
        first, end = (n * self.accumulation for n in (self.step, self.config.last_step))
        records: Iterator[Tensor] | None = None
        if self.targets is not None:
            windows = (
                self.sampler.window_indices(*divmod(number, self.accumulation))
                for number in range(first, end)
            )
            records = self.targets.batches(windows, pinned=gpu)

        def prepare(number: int) -> _Batch:
            inputs, labels = self.sampler.batch(*divmod(number, self.accumulation))
            if gpu:
                inputs, labels = inputs.pin_memory(), labels.pin_memory()
            return inputs, labels, None if records is None else next(records)

        return prefetched(prepare, range(first, end), self._stop_if_alone)

    # ── between updates ───────────────────────────────────────────────────────────────────────

    def _after_update(self, scalars: ScalarLog) -> None:
        config, last = self.config, self.step == self.config.last_step
        # All processes must agree, for all take part in a sharded snapshot, and clocks differ
        stop, timed = self.processes.any_of(
            self.stop_signal is not None, time.monotonic() >= self._next_time_snapshot
        )
        if stop:
            self._stop()
        if self.step % config.log_interval == 0 or last:
            self._log(scalars)
        names: list[str] = []
        evaluated = self.step % config.eval_every == 0 or last
        if evaluated:
            names += self._evaluate(scalars)
            if self.compile_cache is not None and self.processes.main:
                with self.window.paused():
                    self.compile_cache.keep()
        names += self._due()
        if timed:
            self._next_time_snapshot += TIME_EVERY_SECONDS
            names.append(time_name(time.time()))
        if evaluated and not names:
            self._send_record()
        self._save(names)

    def _due(self) -> list[str]:
        """Names of the snapshots that every run of these settings takes at this step, recorded."""
        last = self.step == self.config.train_steps
        begun = self.step > max(self.progress.first_step, 0)
        pausing = self.step == self.config.last_step and not last
        due = (begun and self.step % self.config.save_every == 0) or pausing
        names = [step_name(self.step)] * due + [FINAL] * last
        for name in names:
            self._record_checkpoint(name)
        if last:
            best = {"best_step": self.progress.best_step, "best_value": self.progress.best_value}
            self._record(END, seconds=self.window.trained_seconds(), **best)
        return names

    def _record(self, kind: str, **fields: Any) -> None:
        if self.recorder is not None:
            self.recorder.add(kind, self.step, fields)

    def _record_checkpoint(self, name: str, *, best: bool = False) -> None:
        metric = self.config.save_best_on
        value = self.progress.metrics.get(metric)
        self._record(CHECKPOINT, name=name, best=best, metric=metric, value=value)

    def _send_record(self) -> None:
        if self.recorder is not None:
            self.recorder.send(self.snapshots.keep)

    def _measured(self) -> dict[str, float]:
        """What lines of the record have in common: tokens trained on and seconds, in this run."""
        updates = self.step - max(self.progress.first_step, 0)
        tokens = updates * self.config.global_batch * self.config.context
        return {"tokens": tokens, "seconds": self.window.trained_seconds()}

    def _save(self, names: list[str]) -> None:
        """Queue a snapshot under these names; with FSDP, every process takes part."""
        if not names:
            return
        self._last_save = time.perf_counter()
        self._count_skipped(wait=True)
        if self.processes.any(not self.device_step.weights_are_finite()):
            raise TrainingError(
                f"the weights are not finite after step {self.step}; {self._advice()}"
            )
        self.progress.window = self.window.state(self.processes)
        with self.window.paused():
            if self.processes.main:
                self._send_record()
                self.snapshots.save(self.snapshot(), names)
            elif self.device_step.sharded:
                gather(self._tensors())
        self._saved = self.step

    def _catch_up(self, scalars: ScalarLog) -> None:
        """Make up for log line, evaluation, best or final checkpoint that a kill cut off here."""
        if not self.continued:
            return
        at_end = self.step == self.config.last_step
        if self.window.updates and (self.step % self.config.log_interval == 0 or at_end):
            self._log(scalars)
        due = self.step % self.config.eval_every == 0 or at_end
        # No evaluation is due before a phase's first update
        first_step = self.progress.first_step
        first_steps = (first_step,) if first_step >= 0 else (0, self.origin.get("step"))
        first = self.progress.metrics_step < 0 and self.step in first_steps
        evaluated = due and not first and self.progress.metrics_step != self.step
        names: list[str] = []
        if evaluated:
            names = self._evaluate(scalars)
        elif self.progress.best_step == self.step:
            names = [BEST]
        if evaluated and at_end and self.step < self.config.train_steps:
            names.append(step_name(self.step))  # no later snapshot will tell of it
        names += [FINAL] * (FINAL in self._due())
        self._send_record()
        self._save(names)
        if self.processes.main and BEST not in names and self.progress.best_step >= 0:
            self.snapshots.restore_best(self.progress.best_step)

    def _log(self, scalars: ScalarLog) -> None:
        if self.precision.device.type == "cuda":
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated() / 2**30
        else:
            # getrusage gives KiB, on macOS bytes
            unit = 2**30 if sys.platform == "darwin" else 2**20
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        self._count_skipped(wait=True)
        last = self.step - 1
        measured = self._measured()
        values: dict[str, float] = {
            **self.window.means(self.processes),
            "lr": self._learning_rate(last),
            "alpha": self.alpha.at(last),
            "T": self.temperature.at(last),
            "memory_gib": memory,
        }
        timed, left = self.window.updates - self.window.untimed, 0.0
        if timed:
            tokens = timed * self.config.global_batch * self.config.context
            values["tokens_per_second"] = tokens / max(self.window.seconds(), 1e-9)
            left = (self.config.train_steps - self.step) * self.window.seconds() / timed
        self._record(UPDATE, **measured, **values, skipped=self.progress.skipped)
        if self.progress.skipped:
            values["skipped_updates"] = self.progress.skipped
        shown = ", ".join(f"{name} {_number(value)}" for name, value in values.items())
        shown += f", {duration(left)} left" if left else ""
        speed = values.get("tokens_per_second", 0.0)
        self._shown = f"loss {values.get('loss', math.nan):.4g}, {speed:,.0f} tokens/s"
        log_values(f"step {self.step}/{self.config.train_steps}: {shown}", step=self.step, **values)
        scalars.add({f"train/{name}": value for name, value in values.items()}, self.step)
        self.window.clear()

    def _evaluate(self, scalars: ScalarLog) -> list[str]:
        """Metrics at every context; returns the names of best checkpoints to write.

        Raises:
            Preempted: a signal asked to stop. The evaluation is dropped; started again, the run
                begins with it.
        """
        began = time.perf_counter()
        try:
            with self.window.paused():
                metrics = self.evaluator.metrics(self.student, self.trained_positions)
        except EvaluationStopped:
            self._stop()
        eval_seconds = time.perf_counter() - began
        losses = {name: value for name, value in metrics.items() if "loss" in name and "@" in name}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        tokens = max(self.evaluator.tokens.values())
        message = f"step {self.step}: {shown} on {tokens} tokens ({eval_seconds:.1f} s)"
        taken = {"eval_seconds": eval_seconds, "eval_tokens": tokens}
        log_values(message, step=self.step, **taken, **metrics)
        scalars.add({f"eval/{name}": value for name, value in metrics.items()}, self.step)
        scalars.flush()
        value = metrics[self.config.save_best_on]
        best = math.isfinite(value) and value < self.progress.best_value
        if best and self.processes.any(not self.device_step.weights_are_finite()):
            log.warning("step %d: weights are not finite, so this is not called best", self.step)
            best = False
        # Last and together: a failure before makes this an evaluation that was not
        self.progress.metrics, self.progress.metrics_step = metrics, self.step
        self._record_evaluation(eval_seconds)
        if not best:
            return []
        self.progress.best_value, self.progress.best_step = value, self.step
        name = best_name(self.step, value)
        self._record_checkpoint(name, best=True)
        return [BEST, name]

    def _record_evaluation(self, seconds: float) -> None:
        in_split = len(self.streams.validation) - 1
        self._record(
            EVALUATION,
            **self._measured(),
            eval_seconds=seconds,
            eval_tokens={str(context): n for context, n in self.evaluator.tokens.items()},
            eval_tokens_of_split={str(context): in_split for context in self.evaluator.tokens},
            **self.progress.metrics,
        )

    def snapshot(self) -> Snapshot:
        """The whole state after the last complete update, copied to the CPU."""
        copy = self.copies.copy(self._tensors())
        config = self.config
        snapshot = Snapshot(
            **copy,
            scheduler={
                "step": self.step,
                "peak": config.peak_lr,
                "warmup_steps": config.warmup_steps,
                "train_steps": config.train_steps,
            },
            step=self.step,
            trainer_state={
                **asdict(self.progress),
                "optimizer_names": self.device_step.parameter_names,
                "loss_scale": self.device_step.scaler.state_dict(),
            },
            meta=build_meta(
                config,
                self.student.config,
                step=self.step,
                trained_positions=self.trained_positions,
                metrics=self.progress.metrics,
                metrics_step=self.progress.metrics_step,
                origin=self.origin,
                tokens=self.streams.info.fingerprint,
                targets=None if self.targets is None else self.targets.fingerprint,
            ),
        )
        self.copies.free_with(snapshot, copy)
        return snapshot

    def _tensors(self) -> dict[str, Any]:
        return {
            "model": dict(self.student.state_dict()),
            "optimizer": self.device_step.optimizer.state_dict(),
        }

    # ── a run that ends before its last step ──────────────────────────────────────────────────

    def _on_signal(self, number: signal.Signals) -> None:
        self.stop_signal = number

    def _stop(self) -> NoReturn:
        """Save the last complete update and end; started again, the run goes on from there."""
        name = (self.stop_signal or signal.SIGTERM).name
        # Writing a snapshot again leaves it incomplete for a while, and a kill may come then
        saved = self._saved == self.step
        log.warning("%s: %s step %d and stopping", name, "has" if saved else "saving", self.step)
        if not saved:
            self._save([step_name(self.step)])
        self.snapshots.finish()
        self._close_targets()
        raise self._preempted(name)

    def _preempted(self, name: str) -> Preempted:
        return Preempted(
            f"stopped by {name} at step {self.step}; started again with its output at"
            f" {self.config.uri}, it goes on",
            name,
        )

    def _unsaved(self) -> str:
        """What a process that ends now leaves undone; called in another thread."""
        waiting = ", ".join(self.snapshots.unsent())
        return "; ".join(
            [f"step {self.step} is not saved"] * (self._saved < self.step > self._began)
            + [f"not at {self.config.uri} yet: {waiting}"] * bool(waiting)
        )

    def _rescue(self, reason: Exception) -> None:
        """Before a failure ends the run: save the last complete update, and wait for its arrival.

        Not after updates that were skipped, or weights that are not finite: what was saved before
        is what one goes on from.
        """
        trained = self.step > max(self._saved, self._began)
        if trained and self.processes.main and not isinstance(reason, TrainingError):
            try:
                self._save_alone()
                log.warning("a failure ends the run; saving step %d first", self.step)
            except Exception as error:  # noqa: BLE001 - the first failure is the one to report
                log.warning("step %d is not saved: %s", self.step, one_line(error))
        self.snapshots.rescue(reason)

    def _save_alone(self) -> None:
        """Queue a snapshot; the other processes may have gone on, or may have failed."""
        if not self._whole:
            raise TrainingError("the failure came in the middle of an update")
        if self.device_step.sharded:
            raise TrainingError("the other processes hold parts of it")
        self._count_skipped(wait=True)
        if not self.device_step.weights_are_finite():
            raise TrainingError("its weights are not finite")
        self.progress.window = self.window.state(Processes(device=self.precision.device))
        self._send_record()
        self.snapshots.save(self.snapshot(), [step_name(self.step)])
        self._saved = self.step


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
