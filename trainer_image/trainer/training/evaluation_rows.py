"""Checkpoints beside their teacher: one row for each checkpoint and context."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trainer.checkpoints.snapshots import read_from
from trainer.metrics.evaluated import EvaluationRow
from trainer.models.student import Student
from trainer.runtime.log import log_values
from trainer.settings.config import TrainConfig
from trainer.training.evaluation import Evaluator, perplexity


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate, with its student on the CPU."""

    uri: str
    step: int
    student: Student
    trained_at: int | None
    trained_positions: int
    """Rows of its table; 0 for a rotary student."""

    @classmethod
    def load(cls, uri: str, config: TrainConfig, n_heads: int | None) -> Candidate:
        """Read a checkpoint.

        Raises:
            LiquidError: it cannot be read, is no student's, or does not tell its trained positions.
        """
        checkpoint = read_from(uri, Path(config.local_workdir))
        student = Student(replace(checkpoint.student_config(n_heads), dropout=0.0))
        trained = checkpoint.trained_positions(config.trained_positions, required=True)
        student.load_state_dict(checkpoint.weights, strict=True)
        return cls(uri, checkpoint.step, student, checkpoint.context, trained or 0)

    @property
    def longest(self) -> int:
        """The longest context that it was trained at, in tokens; 0 where nothing tells."""
        return max(self.trained_at or 0, self.trained_positions)

    def rows(self, evaluator: Evaluator) -> list[EvaluationRow]:
        """Its losses and the teacher's at every context."""
        rows: list[EvaluationRow] = []
        student = self.student.to(evaluator.precision.device)
        for context in evaluator.config.eval_ctx_lens:
            loss = evaluator.student_loss(student, context, self.trained_positions)
            teacher_loss = evaluator.teacher_loss(context, student.config.vocab_size)
            teacher_ppl = None if teacher_loss is None else perplexity(teacher_loss)
            rows.append(
                EvaluationRow(
                    self.uri,
                    self.step,
                    self.trained_at,
                    context,
                    loss,
                    perplexity(loss),
                    teacher_loss,
                    teacher_ppl,
                    evaluator.tokens[context],
                    len(evaluator.streams.validation) - 1,
                )
            )
            log_values(f"{self.uri} at context {context}: loss {loss:.4f}", **asdict(rows[-1]))
        student.to("cpu")
        return rows
