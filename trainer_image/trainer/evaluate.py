"""Evaluation at several contexts, in training and as a stage of its own.

    python -m trainer.evaluate OUT_DIR CHECKPOINT [CHECKPOINT …] --teacher_name=… \
        --dataset_name=… --eval_ctx_lens=512,1024
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trainer.checkpoint import Checkpoint, settings_from_meta
from trainer.config import (
    DEFAULT_MICRO_BATCH,
    SETTINGS,
    TrainConfig,
    build_parser,
    resolve,
    run_command,
    settings_from_args,
)
from trainer.errors import UsageError
from trainer.hf_token import find_hf_token
from trainer.log import log, log_values, quiet_libraries, set_up_logging
from trainer.parallel import Processes, full_tensor
from trainer.positions import resize_positions
from trainer.precision import Precision, choose_precision
from trainer.snapshots import read_from
from trainer.start import check_vocabularies
from trainer.storage import atomic_write
from trainer.student import Student
from trainer.teacher import Teacher, load_teacher, read_teacher_spec
from trainer.tokens import IGNORED, TokenStreams, evaluation_batches, streams_for

_CHUNK_ELEMENTS = 1 << 26


@torch.no_grad()
def cross_entropy_sum(hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Sum of cross entropies in fp64, in nats, over labels that are not `IGNORED`.

    Args:
        hidden: ``[N, D]``.
        head: ``[V, D]``.
        bias: ``[V]`` or None.
        labels: ``[N]``.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    head = head.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    for part, wanted in zip(
        hidden.split(max(1, _CHUNK_ELEMENTS // head.shape[0])),
        labels.split(max(1, _CHUNK_ELEMENTS // head.shape[0])),
        strict=True,
    ):
        logits = F.linear(part, head, bias).float()
        losses = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none")
        total += losses.double().sum()
    return total


@torch.no_grad()
def mean_loss(
    hidden: Callable[[Tensor], Tensor],
    head: Tensor,
    bias: Tensor | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes,
) -> float:
    """Token-weighted mean cross entropy in nats over the batches ``[B, T]`` of all processes."""
    device = processes.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for inputs, labels in batches:
        total[1] += int((labels != IGNORED).sum())
        states = hidden(inputs.to(device, non_blocking=True))
        total[0] += cross_entropy_sum(
            states.flatten(0, 1), head, bias, labels.flatten().to(device, non_blocking=True)
        )
    loss, tokens = processes.sum(total).tolist()
    return loss / tokens


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats; infinity where that overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf


class Evaluator:
    """Student and teacher losses over the validation split at every context of a run.

    The teacher never changes, so each of its losses is computed once.
    """

    def __init__(
        self,
        config: TrainConfig,
        streams: TokenStreams,
        teacher: Teacher | None,
        precision: Precision,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes(device=precision.device)
        self.config = config
        self.streams = streams
        self.teacher = teacher
        self.precision = precision
        self._teacher_losses: dict[int, float] = {}

    def metrics(self, student: Student, trained_positions: int) -> dict[str, float]:
        """``val_loss_student@512``, ``val_ppl_student@512``, ``val_loss_teacher@512``, …

        The same names without ``@`` are those of the training context.
        """
        metrics: dict[str, float] = {}
        for context in self.config.contexts:
            losses = {"student": self.student_loss(student, context, trained_positions)}
            teacher_loss = self.teacher_loss(context, student.config.vocab_size)
            if teacher_loss is not None:
                losses["teacher"] = teacher_loss
            for who, loss in losses.items():
                values = {f"val_loss_{who}": loss, f"val_ppl_{who}": perplexity(loss)}
                metrics |= {f"{name}@{context}": value for name, value in values.items()}
                if context == self.config.block_size:
                    metrics |= values
        return metrics

    def student_loss(
        self, student: Student, context: int, trained_positions: int, *, raw: bool = False
    ) -> float:
        """Mean loss in nats at a context.

        Past the trained positions the table is used as `resize_positions` would make it, unless
        ``raw``; the weights stay as they are.
        """
        table = None
        if student.pos is not None and context > trained_positions and not raw:
            table = resize_positions(
                full_tensor(student.pos.weight.detach()),
                trained_positions,
                context,
                self.config.pos_resize,
            )
        was_training = student.training
        student.eval()
        try:
            with torch.no_grad(), self.precision.autocast():
                return mean_loss(
                    lambda ids: student(ids, table),
                    full_tensor(student.lm_head.weight.detach()),
                    None,
                    self._batches(context),
                    self.processes,
                )
        finally:
            student.train(was_training)
            if isinstance(student, FSDPModule):
                student.reshard()

    def teacher_loss(self, context: int, vocab_size: int) -> float | None:
        """Mean loss in nats at a context, None where there is no teacher or it is too long."""
        teacher = self.teacher
        if teacher is None:
            return None
        if context not in self._teacher_losses:
            longest = teacher.spec.max_context
            if longest is not None and context > longest:
                log.info(
                    "context %d is past the teacher's %d positions: student only", context, longest
                )
                self._teacher_losses[context] = math.nan
            else:
                bias = None if teacher.bias is None else teacher.bias[:vocab_size]
                self._teacher_losses[context] = mean_loss(
                    teacher.hidden,
                    teacher.head[:vocab_size],
                    bias,
                    self._batches(context),
                    self.processes,
                )
        loss = self._teacher_losses[context]
        return None if math.isnan(loss) else loss

    def _batches(self, context: int) -> Iterable[tuple[Tensor, Tensor]]:
        tokens_per_batch = self.config.micro_batch * self.config.context
        return evaluation_batches(
            self.streams.validation,
            context=context,
            batch=max(1, tokens_per_batch // context),
            max_tokens=self.config.eval_max_tokens,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )


# ── the stage ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class EvaluationRow:
    """One checkpoint at one context; losses in nats, None where there is no teacher's."""

    checkpoint: str
    step: int
    trained_at: int | None
    """Context it was trained at, in tokens; None where its metadata does not tell."""
    context: int
    student_loss: float
    student_ppl: float
    teacher_loss: float | None
    teacher_ppl: float | None


def run(config: TrainConfig, checkpoints: Sequence[str], output: str) -> list[EvaluationRow]:
    """Evaluate checkpoints at every context of ``eval_ctx_lens``, and the teacher beside them.

    Writes ``metrics.json`` (the rows) and ``metrics.md`` (a table) to ``output``.

    Args:
        config: ``teacher_name``, ``eval_ctx_lens``, and a data set or ``tokens_dir``.
        checkpoints: paths or ``gs://`` URIs.
        output: a local directory.

    Raises:
        LiquidError: a checkpoint, the data set or the teacher cannot be loaded, or they do not
            fit together.
    """
    if not config.eval_ctx_lens:
        raise UsageError("missing: --eval_ctx_lens; give contexts in tokens, for example 512,1024")
    config = replace(
        config,
        block_size=max(config.eval_ctx_lens),
        micro_batch=config.micro_batch or DEFAULT_MICRO_BATCH,
    )
    config.require("teacher_name", "dataset_name")
    token = find_hf_token(config)
    precision = choose_precision(config)
    students = [_load_student(uri, config) for uri in checkpoints]
    streams = streams_for(config, token)
    spec = read_teacher_spec(config.teacher, token)
    for uri, (_, student, _) in zip(checkpoints, students, strict=True):
        size = student.config.vocab_size
        check_vocabularies(size, streams.info.vocab_size, spec.vocab_size, uri)
    teacher = load_teacher(spec, dtype=precision.teacher, device=precision.device, token=token)
    evaluator = Evaluator(config, streams, teacher, precision)
    rows: list[EvaluationRow] = []
    for uri, (checkpoint, student, trained) in zip(checkpoints, students, strict=True):
        student.to(precision.device)
        for context in config.eval_ctx_lens:
            loss = evaluator.student_loss(student, context, trained)
            theirs = evaluator.teacher_loss(context, student.config.vocab_size)
            rows.append(
                EvaluationRow(
                    uri,
                    checkpoint.step,
                    checkpoint.meta.get("block_size"),
                    context,
                    loss,
                    perplexity(loss),
                    theirs,
                    None if theirs is None else perplexity(theirs),
                )
            )
            log_values(f"{uri} at context {context}: loss {loss:.4f}", **asdict(rows[-1]))
        student.to("cpu")
    directory = Path(output)
    with atomic_write(directory / "metrics.json") as file:
        file.write(json.dumps([asdict(row) for row in rows], indent=2).encode())
    with atomic_write(directory / "metrics.md") as file:
        file.write(markdown_table(rows).encode())
    return rows


def _load_student(uri: str, config: TrainConfig) -> tuple[Checkpoint, Student, int]:
    """A checkpoint with its student and the number of its trained positions."""
    checkpoint = read_from(uri, Path(config.local_workdir))
    resolved = resolve({}, {}, settings_from_meta(checkpoint.meta)).config
    student_config = checkpoint.student_config(
        n_heads=resolved.n_heads, rope_scale=resolved.rope_scale, dropout=0.0
    )
    student = Student(student_config)
    student.load_state_dict(checkpoint.weights, strict=True)
    trained = config.trained_positions or checkpoint.trained_positions() or student_config.positions
    return checkpoint, student, trained


def markdown_table(rows: Sequence[EvaluationRow]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| checkpoint | step | trained at | context | student loss | ppl | teacher loss | ppl |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs = ("–", "–")
        if row.teacher_loss is not None and row.teacher_ppl is not None:
            theirs = (f"{row.teacher_loss:.4f}", f"{row.teacher_ppl:.2f}")
        cells = (
            row.checkpoint,
            row.step,
            row.trained_at or "–",
            row.context,
            f"{row.student_loss:.4f}",
            f"{row.student_ppl:.2f}",
            *theirs,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


FLAGS = [
    name
    for name in SETTINGS
    if name in ("teacher_name", "teacher_precision", "text_column", "cache_dir", "tokens_dir")
    or name in ("eval_ctx_lens", "eval_max_tokens", "micro_batch", "pos_resize", "local_workdir")
    or name in ("trained_positions", "bf16", "fp16", "fp32")
    or name.startswith(("dataset_", "hf_"))
]


def main(argv: list[str]) -> None:
    """The command line; prints the table."""
    parser = build_parser("python -m trainer.evaluate", str(__doc__), only=FLAGS)
    parser.add_argument("output", metavar="OUT_DIR", help="a local directory")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="paths or gs:// URIs")
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    print(
        markdown_table(
            run(resolve(settings_from_args(args), {}).config, args.checkpoints, args.output)
        )
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
