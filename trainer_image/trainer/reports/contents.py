"""What a report says, before it is a page or a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trainer.metrics.evaluated import EvaluationRow
from trainer.reports.amounts import (
    NOTHING,
    count,
    duration,
    figures,
    nats,
    percent,
    ratio,
    signed_nats,
    whole,
)
from trainer.reports.gaps import Comparison, closed_share, compared, warnings_of
from trainer.reports.run_plots import Plots, phase_plots, run_plots
from trainer.reports.run_tables import (
    checkpoints_table,
    evaluated_on,
    evaluation_table,
    evaluations_table,
    settings_tables,
    times_tables,
)
from trainer.reports.runs import Run
from trainer.reports.samples import Sample
from trainer.reports.tables import Table
from trainer.runtime.strict_json import finite_number


@dataclass(frozen=True)
class Fact:
    """A value with its name and a remark."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class RunPart:
    """The part of a report on one run."""

    title: str
    location: str
    facts: Sequence[Fact]
    warnings: Sequence[str]
    plots: Sequence[Plots]
    tables: Sequence[Table]


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    facts: Sequence[Fact]
    warnings: Sequence[str]
    plots: Sequence[Plots]
    tables: Sequence[Table]
    times: Sequence[Table]
    runs: Sequence[RunPart]
    samples: Sequence[Sample] = field(default=())


def build_report(
    runs: Sequence[Run],
    rows: Sequence[EvaluationRow] = (),
    samples: Sequence[Sample] = (),
    problems: Sequence[str] = (),
) -> Report:
    """A report on the runs of one training, in the order in which they were trained.

    Args:
        runs: one, or one for each phase.
        rows: of the evaluation of their checkpoints; empty where there was none.
        samples: of text; empty where there are none.
        problems: sentences on what the report lacks.
    """
    return Report(
        title=_title(runs, rows),
        facts=_facts(runs, rows),
        warnings=[*problems, *warnings_of(rows)],
        plots=[phase_plots(runs)] if len(runs) > 1 else [],
        tables=[evaluation_table(rows)] if rows else [],
        times=times_tables(runs),
        runs=[_part(run, number if len(runs) > 1 else 0) for number, run in enumerate(runs, 1)],
        samples=samples,
    )


def _title(runs: Sequence[Run], rows: Sequence[EvaluationRow]) -> str:
    contexts = [str(run.context) for run in runs if run.context is not None]
    if not contexts:
        return "Evaluation" if rows else "Training report"
    return f"Training at context {', then '.join(contexts)}"


# ── the result, at the top ────────────────────────────────────────────────────────────────────


def _facts(runs: Sequence[Run], rows: Sequence[EvaluationRow]) -> list[Fact]:
    if rows:
        table = compared(rows)
        last = {comparison.row.context: comparison for comparison in table}
        return [_fact_of_row(comparison) for comparison in last.values()]
    return [fact for run in runs[-1:] for fact in _facts_of_run(run)]


def _fact_of_row(comparison: Comparison) -> Fact:
    remarks = [f"perplexity {ratio(comparison.row.student_ppl)}"]
    if comparison.teacher is not None:
        remarks.append(f"teacher {nats(comparison.teacher)}")
    if comparison.difference is not None:
        remarks.append(f"{signed_nats(comparison.difference)} since the first checkpoint")
    if comparison.closed is not None:
        remarks.append(f"{percent(comparison.closed)} of the gap closed")
    name = f"loss at context {comparison.row.context}"
    return Fact(name, f"{nats(comparison.loss)} nats", " · ".join(remarks))


def _facts_of_run(run: Run) -> Iterator[Fact]:
    picked = run.picked
    if picked is None:
        return
    for context in run.contexts:
        loss, first = run.loss_at(picked.step, context), _first_loss(run, context)
        teacher = run.teacher_loss(context)
        closed = closed_share(first, loss, teacher)
        remarks = [f"perplexity {ratio(_perplexity(loss))}"]
        remarks += [] if teacher is None else [f"teacher {nats(teacher)}"]
        if closed is not None and first != loss:
            remarks.append(f"{percent(closed)} of the gap closed since the first evaluation")
        remarks += [run.evaluated(context)] if run.evaluated(context) else []
        yield Fact(f"best loss at context {context}", f"{nats(loss)} nats", " · ".join(remarks))


def _first_loss(run: Run, context: int) -> float | None:
    points = run.validation("student", context)
    return finite_number(points[0][1]) if points else None


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None or loss > 700 else math.exp(loss)


# ── one run ───────────────────────────────────────────────────────────────────────────────────


def _part(run: Run, number: int) -> RunPart:
    """A run's part; its number is 0 where it is the only one."""
    tables = [checkpoints_table(run), evaluations_table(run), *settings_tables(run)]
    return RunPart(
        title=f"Phase {number}: {_where(run)}" if number else "The run",
        location=run.location,
        facts=list(_facts_of_part(run)),
        warnings=run.warnings,
        plots=list(run_plots(run)),
        tables=[table for table in tables if table.rows],
    )


def _facts_of_part(run: Run) -> Iterator[Fact]:
    header = run.record.header
    picked = run.picked
    if picked is not None:
        yield Fact("picked", f"step {whole(picked.step)}", f"{picked.metric} {nats(picked.value)}")
    yield Fact("trained", f"{count(run.tokens)} tokens", f"{whole(run.step)} updates")
    if run.training_seconds is not None:
        evaluations = duration(run.evaluation_seconds)
        yield Fact("time", duration(run.training_seconds), f"and {evaluations} of evaluations")
    yield Fact("student", count(header["student"].get("parameters")), "parameters")
    teacher = header["teacher"]
    size = f"{count(teacher.get('parameters'))} parameters"
    remark = "from stored targets" if teacher.get("targets") else size
    name = run.teacher or "none"
    shown = name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name
    yield Fact("teacher", shown, remark if run.teacher else "")
    machine = header["machine"]
    remark = f"{figures(machine.get('gpus'))} of them" if machine.get("gpu") else ""
    cpus = f"{figures(machine.get('cpus'))} CPUs"
    yield Fact("machine", str(machine.get("gpu") or cpus), remark)
    code, libraries = header["code"], header["libraries"]
    commit = str(code.get("commit") or "")[:12]
    versions = ", ".join(f"{name} {version}" for name, version in libraries.items())
    version = f"{code.get('version') or NOTHING} {commit}".strip()
    yield Fact("code", version, versions)


# ── a few lines for a terminal ────────────────────────────────────────────────────────────────


def short_lines(runs: Sequence[Run], rows: Sequence[EvaluationRow]) -> list[str]:
    """The result in a few lines: the evaluation's table, then what to be warned of."""
    lines = evaluation_table(rows).text().splitlines() if rows else []
    lines += [f"losses in nats; {text}" for text in evaluated_on(rows)]
    for run in runs:
        best = "no best checkpoint"
        if run.picked is not None:
            value = f"{run.picked.metric} {nats(run.picked.value)}"
            best = f"best {value} at step {whole(run.picked.step)}"
        lines.append(
            f"{_where(run)}: {whole(run.step)} updates, {count(run.tokens)} tokens, {best}"
        )
    lines += [f"note: {text}" for text in warnings_of(rows)]
    return lines + [f"note, {_where(run)}: {text}" for run in runs for text in run.warnings]


def _where(run: Run) -> str:
    return "unknown context" if run.context is None else f"context {run.context}"
