"""The tables of a report: evaluations, checkpoints, settings, times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.metrics.evaluated import EvaluationRow
from trainer.reports.amounts import (
    NOTHING,
    count,
    duration,
    moment,
    nats,
    percent,
    ratio,
    signed_nats,
    tokens_of_split,
    whole,
)
from trainer.reports.gaps import checkpoint_label, compared
from trainer.reports.runs import WHO, Run
from trainer.reports.tables import Column, Table
from trainer.runtime.strict_json import finite_number

MOST_ROWS = 60
"""Of a table of evaluations or checkpoints; the record has all of them."""


def evaluation_table(rows: Sequence[EvaluationRow]) -> Table:
    """Checkpoints beside their teacher at every context, and what came of the gap."""
    table = compared(rows)
    columns = ("loss", "perplexity", "difference", "teacher", "its perplexity", "gap closed")
    shown = [
        [
            f"{one.row.context}",
            checkpoint_label(one.row),
            nats(one.loss),
            ratio(one.row.student_ppl),
            signed_nats(one.difference),
            nats(one.teacher),
            ratio(one.row.teacher_ppl),
            percent(one.closed),
        ]
        for one in table
    ]
    told = evaluated_on(rows)
    sentences = [
        "Losses are in nats per token;" if told else "Losses are in nats per token.",
        *told,
        "The difference and the closed share of the gap to the teacher are those to the first"
        " checkpoint at the same context.",
    ]
    notes = [" ".join(sentences)]
    if any(row.trained_at is not None and row.context > row.trained_at for row in rows):
        notes.append(
            "Past the context that it was trained at, a checkpoint with learned positions is read"
            " through its table stretched as the resize stage stretches it: that is the student"
            " before the continuation."
        )
    headings = [Column("context"), Column("checkpoint", numeric=False), *map(Column, columns)]
    return Table("Checkpoints and teacher, by context", headings, shown, notes=notes)


def evaluated_on(rows: Sequence[EvaluationRow]) -> list[str]:
    """How many tokens the losses are means over; one sentence where it is the same everywhere."""
    told: dict[str, list[str]] = {}
    for row in rows:
        words = tokens_of_split(row.tokens, row.tokens_of_split)
        if words and str(row.context) not in told.setdefault(words, []):
            told[words].append(str(row.context))
    if len(told) == 1:
        return [f"they are means over {next(iter(told))}."]
    return [
        f"at context {' and '.join(contexts)} they are means over {words}."
        for words, contexts in told.items()
    ]


def times_tables(runs: Sequence[Run]) -> list[Table]:
    """When the runs began and how long they took; no table where there is no run."""
    if not runs:
        return []
    rows = [
        [
            f"{number} · context {run.context}",
            moment(run.record.header["started"]),
            whole(1 + len(run.record.starts)),
            whole(run.step),
            count(run.tokens),
            duration(run.training_seconds),
            duration(run.evaluation_seconds),
        ]
        for number, run in enumerate(runs, 1)
    ]
    columns = [Column("phase", numeric=False), Column("first start", numeric=False)]
    numbers = ("starts", "updates", "tokens", "training", "evaluations")
    return [Table("Times", [*columns, *map(Column, numbers)], rows)]


def _thinned_rows(run: Run) -> list[int]:
    """Numbers of the evaluations that a table shows, with the first, the picked and the last."""
    total = len(run.record.evaluations)
    if total <= MOST_ROWS:
        return list(range(total))
    chosen = {round(number * (total - 1) / (MOST_ROWS - 2)) for number in range(MOST_ROWS - 1)}
    if run.picked is not None:
        steps = [one["step"] for one in run.record.evaluations]
        chosen |= {steps.index(run.picked.step)} if run.picked.step in steps else set()
    return sorted(chosen)


def evaluations_table(run: Run) -> Table:
    """A run's losses by evaluation, the picked one marked."""
    numbers = _thinned_rows(run)
    chosen = [run.record.evaluations[number] for number in numbers]
    with_teacher = {context: run.teacher_loss(context) is not None for context in run.contexts}
    columns = [Column("step"), Column("tokens")]
    for context in run.contexts:
        columns.append(Column(f"student @{context}"))
        columns += [Column(f"teacher @{context}"), Column("gap")] * with_teacher[context]
    rows = []
    for record in chosen:
        row = [whole(record["step"]), count(record.get("tokens"))]
        for context in run.contexts:
            student, teacher = (
                finite_number(record.get(f"val_loss_{who}@{context}")) for who in WHO
            )
            row.append(nats(student))
            if with_teacher[context]:
                gap = student - teacher if student is not None and teacher is not None else None
                row += [nats(teacher), signed_nats(gap)]
        rows.append(row)
    picked = run.picked
    marked = {n for n, record in enumerate(chosen) if picked and record["step"] == picked.step}
    notes = [f"At context {c}: {told}." for c in run.contexts if (told := run.evaluated(c))]
    if len(chosen) < len(run.record.evaluations):
        total = whole(len(run.record.evaluations))
        notes.append(f"{len(chosen)} of {total} evaluations; metrics.jsonl has all of them.")
    return Table("Evaluations", columns, rows, frozenset(marked), notes, folded=len(chosen) > 12)


def checkpoints_table(run: Run) -> Table:
    """What a run has saved by step, the picked one marked and why."""
    names: dict[int, list[str]] = {}
    values: dict[int, str] = {}
    for record in run.record.checkpoints:
        names.setdefault(record["step"], []).append(record["name"])
        value = finite_number(record.get("value"))
        if value is not None:
            values[record["step"]] = f"{record['metric']} {nats(value)}"
    steps = sorted(names)
    left_out = len(steps) - MOST_ROWS
    if left_out > 0:
        steps = steps[-MOST_ROWS:]
    picked = run.picked
    if picked and picked.step not in steps:
        steps = [picked.step, *steps]
    rows = [
        [
            whole(step),
            ", ".join(dict.fromkeys(names[step])),
            values.get(step, NOTHING),
            _why(run) if picked and step == picked.step else "",
        ]
        for step in steps
    ]
    marked = {number for number, step in enumerate(steps) if picked and step == picked.step}
    columns = [Column("step"), *(Column(name, numeric=False) for name in ("names", "metric", ""))]
    notes = ["Retention may have removed older ones since."] if rows else []
    notes += [f"The first {whole(left_out)} are left out."] if left_out > 0 else []
    return Table("Checkpoints", columns, rows, frozenset(marked), notes, folded=len(rows) > 12)


def _why(run: Run) -> str:
    """Why the best checkpoint is the one picked."""
    assert run.picked is not None
    number = len(run.record.evaluations)
    return f"picked: the lowest {run.picked.metric} of {number} evaluation{'s' * (number != 1)}"


def settings_tables(run: Run) -> Iterator[Table]:
    """The settings with their sources: those that were given, then the others."""
    columns = [Column(name, numeric=False) for name in ("setting", "value", "source")]
    given = [setting for setting in run.settings if not setting.by_default]
    default = [setting for setting in run.settings if setting.by_default]
    for caption, settings in (
        ("Settings", given),
        ("Settings left at their defaults", default),
    ):
        if settings:
            rows = [[setting.name, setting.value, setting.source] for setting in settings]
            yield Table(caption, columns, rows, folded=True)
