"""The evaluation stage's rows: checkpoints beside their teacher, and the gap between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.metrics.evaluated import EvaluationRow
from trainer.reports.amounts import nats
from trainer.runtime.strict_json import finite_number


@dataclass(frozen=True)
class Comparison:
    """A checkpoint at a context, beside the first checkpoint of the table and the teacher."""

    row: EvaluationRow
    loss: float | None
    """The student's, in nats; None where it is not finite."""
    teacher: float | None
    difference: float | None
    """To the first checkpoint at this context, in nats; negative is better."""
    closed: float | None
    """Share of the first checkpoint's gap to the teacher; None where there was no gap."""


def compared(rows: Sequence[EvaluationRow]) -> list[Comparison]:
    """Each row beside the first checkpoint's at its context; by context, then in their order."""
    found = []
    for context in sorted({row.context for row in rows}):
        of_context = [row for row in rows if row.context == context]
        found += [_beside(of_context[0], row) for row in of_context]
    return found


def _beside(first: EvaluationRow, row: EvaluationRow) -> Comparison:
    loss, before = finite_number(row.student_loss), finite_number(first.student_loss)
    teacher = finite_number(row.teacher_loss)
    difference = None
    if row is not first and loss is not None and before is not None:
        difference = loss - before
    closed = None if difference is None else closed_share(before, loss, teacher)
    return Comparison(row, loss, teacher, difference, closed)


def closed_share(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """The share of the gap between a student and its teacher that training has closed.

    None where one of the losses (in nats) is missing, or the teacher was no better to begin with.
    """
    if before is None or after is None or teacher is None or not teacher < before:
        return None
    return (before - after) / (before - teacher)


def checkpoint_label(row: EvaluationRow) -> str:
    """What tells a checkpoint from the others of a table."""
    trained = "" if row.trained_at is None else f"context {row.trained_at}, "
    return f"{trained}step {row.step}"


def warnings_of(rows: Iterable[EvaluationRow]) -> list[str]:
    """Sentences on what a reader of the table should know."""
    told = []
    for row in rows:
        student, teacher = finite_number(row.student_loss), finite_number(row.teacher_loss)
        where = f"At context {row.context}"
        if student is None:
            told.append(
                f"{where} the loss of the checkpoint {checkpoint_label(row)} is not finite."
            )
        elif teacher is not None and teacher >= student:
            told.append(
                f"{where} the teacher ({nats(teacher)}) is no better than the student"
                f" {checkpoint_label(row)} ({nats(student)})."
            )
        elif teacher is None:
            told.append(f"{where} there is no loss of the teacher: it is past its longest context.")
    return list(dict.fromkeys(told))
