"""Evaluation at several contexts, in training and as a stage of its own.

    python -m trainer.evaluate OUT_DIR CHECKPOINT [CHECKPOINT …] --teacher_name=… \
        --dataset_name=… --eval_ctx_lens=512,1024
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trainer.checkpoint import Checkpoint
from trainer.config import (
    SETTINGS,
    TrainConfig,
    build_parser,
    for_evaluation,
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
from trainer.start import check_vocabularies, known_trained_rows, student_config
from trainer.storage import atomic_write, check_output, is_remote, open_location
from trainer.strict_json import dumps
from trainer.student import Student
from trainer.teacher import Teacher, load_teacher, read_teacher_spec
from trainer.tokens import IGNORED, TokenStreams, evaluation_batches, streams_for

_EAGER_ELEMENTS, _COMPILED_ELEMENTS = 1 << 26, 1 << 28
"""Logits at a time; compiled, they exist in the type of the hidden state alone, not in fp32."""


class EvaluationStopped(Exception):
    """An evaluation was broken off because the run is to stop."""


@torch.no_grad()
def cross_entropy_sum(
    hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor, *, compiled: bool = False
) -> Tensor:
    """Sum of cross entropies in fp64, in nats, over labels that are not `IGNORED`.

    Args:
        hidden: ``[N, D]``.
        head: ``[V, D]``.
        bias: ``[V]`` or None.
        labels: ``[N]``.
        compiled: by `torch.compile`, for which ``N`` should be the same in every call.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    head = head.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    chunk_loss = _compiled_chunk_loss() if compiled else _chunk_loss
    elements = len(hidden) * head.shape[0]
    # Nearly equal parts have two lengths at most, each of which is compiled
    parts = -(-elements // (_COMPILED_ELEMENTS if compiled else _EAGER_ELEMENTS))
    for part, wanted in zip(hidden.tensor_split(parts), labels.tensor_split(parts), strict=True):
        total += chunk_loss(part, head, bias, wanted)
    return total


def _chunk_loss(hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, head, bias).float()
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return losses.double().sum()


@cache
def _compiled_chunk_loss() -> Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]:
    return torch.compile(_chunk_loss, dynamic=False)


@torch.no_grad()
def mean_loss(
    hidden: Callable[[Tensor], Tensor],
    head: Tensor,
    bias: Tensor | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes,
    stopping: Callable[[], bool] | None = None,
    *,
    compiled: bool = False,
) -> float:
    """Token-weighted mean cross entropy in nats over the batches ``[B, T]`` of all processes.

    Args:
        hidden: ``[B, T]`` token ids to the last hidden state ``[B, T, D]``.
        head: ``[V, D]``.
        bias: ``[V]`` or None.
        batches: inputs and labels, as many on every process.
        processes: this process among those of the run.
        stopping: whether this process was asked to stop; looked at before every batch.
        compiled: head and loss by `torch.compile`.

    Raises:
        EvaluationStopped: one of the processes was asked to stop; every process raises it.
    """
    device = processes.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for inputs, labels in batches:
        # Each process has as many batches, so they ask one another as often
        if stopping is not None and processes.any(stopping()):
            raise EvaluationStopped
        total[1] += int((labels != IGNORED).sum())
        states = hidden(inputs.to(device, non_blocking=True))
        wanted = labels.flatten().to(device, non_blocking=True)
        total[0] += cross_entropy_sum(states.flatten(0, 1), head, bias, wanted, compiled=compiled)
    loss, tokens = processes.sum(total).tolist()
    return loss / tokens


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats; infinity where that overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf


class Evaluator:
    """Student and teacher losses over the validation split at every context of a run.

    The teacher never changes, so each of its losses is computed once. In training it is evaluated
    as it is distilled from: with ``--teacher_precision=fp8`` its losses are those of its fp8 form.

    Args:
        config: with the contexts, ``micro_batch`` and ``eval_max_tokens``.
        streams: the validation tokens among them.
        teacher: None where there is none.
        precision: device and compute types.
        processes: this process among those of the run; alone by default.
        stopping: whether this process was asked to stop, see `mean_loss`.
    """

    def __init__(
        self,
        config: TrainConfig,
        streams: TokenStreams,
        teacher: Teacher | None,
        precision: Precision,
        processes: Processes | None = None,
        stopping: Callable[[], bool] | None = None,
    ) -> None:
        self.processes = processes or Processes(device=precision.device)
        self.config = config
        self.streams = streams
        self.teacher = teacher
        self.precision = precision
        self.stopping = stopping
        # Head and loss. The student's body is not: that takes longer than it gives back, see
        # bench/README.md
        self._compiled = precision.compiles(config)
        self._teacher_losses: dict[tuple[int, int], float] = {}
        """By context and size of the vocabulary."""

    def metrics(self, student: Student, trained_positions: int) -> dict[str, float]:
        """``val_loss_student@512``, ``val_ppl_student@512``, ``val_loss_teacher@512``, …

        The same names without ``@`` are those of the training context.

        Raises:
            EvaluationStopped: see `mean_loss`.
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
                    self.stopping,
                    compiled=self._compiled,
                )
        finally:
            student.train(was_training)
            if isinstance(student, FSDPModule):
                student.reshard()

    def teacher_loss(self, context: int, vocab_size: int) -> float | None:
        """Mean loss in nats at a context, None where there is no teacher or it is too long.

        Args:
            context: in tokens.
            vocab_size: of the student; the teacher's further logits are left out.
        """
        teacher, key = self.teacher, (context, vocab_size)
        if teacher is None:
            return None
        if key not in self._teacher_losses:
            longest = teacher.spec.max_context
            if longest is not None and context > longest:
                log.info(
                    "context %d is past the teacher's %d positions: student only", context, longest
                )
                self._teacher_losses[key] = math.nan
            else:
                bias = None if teacher.bias is None else teacher.bias[:vocab_size]
                self._teacher_losses[key] = mean_loss(
                    teacher.hidden,
                    teacher.head[:vocab_size],
                    bias,
                    self._batches(context),
                    self.processes,
                    self.stopping,
                    compiled=self._compiled,
                )
        loss = self._teacher_losses[key]
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


def check_contexts(
    contexts: Iterable[int], trained_at: int, streams: TokenStreams, max_tokens: int
) -> None:
    """Refuse contexts that no token of the validation split can have before it.

    They would take memory, and far from their loss would be that of a shorter one. What was
    trained at goes through: a small split is worth something at it, and its memory is known.

    Args:
        contexts: to evaluate at, in tokens.
        trained_at: the longest context trained at, in tokens.
        streams: the validation tokens among them.
        max_tokens: ``eval_max_tokens``; 0 takes them all.

    Raises:
        UsageError: one is longer than what is evaluated.
    """
    tokens = len(streams.validation)
    for context in sorted(contexts):
        if context > max(trained_at, tokens):
            raise UsageError(
                f"--eval_ctx_lens={context} is longer than the validation split of {tokens} tokens;"
                " leave it out"
            )
        if 0 < max_tokens < context and context > trained_at:
            raise UsageError(
                f"--eval_ctx_lens={context} is longer than --eval_max_tokens={max_tokens};"
                " leave it out, or evaluate on more"
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


@dataclass(frozen=True)
class _Loaded:
    """A checkpoint to evaluate."""

    uri: str
    checkpoint: Checkpoint
    student: Student
    trained_positions: int
    """Rows of its table; 0 for a rotary student."""

    @property
    def trained_at(self) -> int | None:
        """Context it was trained at, in tokens; None where its metadata does not tell."""
        said = self.checkpoint.meta.get("block_size")
        return said if isinstance(said, int) else None


def run(
    config: TrainConfig, checkpoints: Sequence[str], output: str, *, n_heads: int | None = None
) -> list[EvaluationRow]:
    """Evaluate checkpoints at every context of ``eval_ctx_lens``, and the teacher beside them.

    Writes ``metrics.json`` (the rows) and ``metrics.md`` (a table) to ``output``.

    Args:
        config: ``teacher_name``, ``eval_ctx_lens``, and a data set or ``tokens_dir``.
        checkpoints: paths or ``gs://`` URIs.
        output: a local directory or ``gs://`` prefix; metrics that are there are replaced.
        n_heads: attention heads of checkpoints whose metadata does not tell (default 12).

    Raises:
        LiquidError: a checkpoint, the data set or the teacher cannot be loaded, or they do not
            fit together, or the output cannot be written.
    """
    config = for_evaluation(config)
    check_output(output)
    token = find_hf_token(config)
    precision = choose_precision(config)
    loaded = [_load_student(uri, config, n_heads) for uri in checkpoints]
    streams = streams_for(config, token)
    longest = max((max(one.trained_at or 0, one.trained_positions) for one in loaded), default=0)
    check_contexts(config.eval_ctx_lens, longest, streams, config.eval_max_tokens)
    spec = read_teacher_spec(config.teacher, token)
    for one in loaded:
        size = one.student.config.vocab_size
        check_vocabularies(size, streams.info.vocab_size, spec.vocab_size, one.uri)
    teacher = load_teacher(spec, dtype=precision.teacher, device=precision.device, token=token)
    evaluator = Evaluator(config, streams, teacher, precision)
    rows = [row for one in loaded for row in _rows(one, evaluator)]
    _write(rows, output)
    return rows


def _load_student(uri: str, config: TrainConfig, n_heads: int | None) -> _Loaded:
    """A checkpoint with its student and the number of its trained positions."""
    checkpoint = read_from(uri, Path(config.local_workdir))
    shapes = replace(student_config(checkpoint, n_heads), dropout=0.0)
    trained = known_trained_rows(checkpoint, config.trained_positions)
    student = Student(shapes)
    student.load_state_dict(checkpoint.weights, strict=True)
    return _Loaded(uri, checkpoint, student, trained or 0)


def _rows(one: _Loaded, evaluator: Evaluator) -> list[EvaluationRow]:
    """A checkpoint at every context."""
    rows: list[EvaluationRow] = []
    student = one.student.to(evaluator.precision.device)
    for context in evaluator.config.eval_ctx_lens:
        loss = evaluator.student_loss(student, context, one.trained_positions)
        theirs = evaluator.teacher_loss(context, student.config.vocab_size)
        rows.append(
            EvaluationRow(
                one.uri,
                one.checkpoint.step,
                one.trained_at,
                context,
                loss,
                perplexity(loss),
                theirs,
                None if theirs is None else perplexity(theirs),
            )
        )
        log_values(f"{one.uri} at context {context}: loss {loss:.4f}", **asdict(rows[-1]))
    student.to("cpu")
    return rows


def _write(rows: Sequence[EvaluationRow], output: str) -> None:
    written = {
        "metrics.json": dumps([asdict(row) for row in rows], indent=2),
        "metrics.md": markdown_table(rows),
    }
    if is_remote(output):
        location = open_location(output)
        location.list()  # what is there now may be replaced
        for name, text in written.items():
            location.put_bytes(text.encode(), name)
        return
    for name, text in written.items():
        with atomic_write(Path(output, name)) as file:
            file.write(text.encode())


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
    or name in ("n_heads", "trained_positions", "bf16", "fp16", "fp32")
    or name.startswith(("dataset_", "hf_"))
]


def main(argv: list[str]) -> None:
    """The command line; prints the table."""
    parser = build_parser("python -m trainer.evaluate", str(__doc__), only=FLAGS)
    parser.add_argument("output", metavar="OUT_DIR", help="a directory or gs:// URI")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="paths or gs:// URIs")
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    # With the name of a checkpoint its shapes are not held against defaults
    resolved = resolve({**settings_from_args(args), "resume_gcs_uri": args.checkpoints[0]}, {})
    n_heads = resolved.config.n_heads if resolved.given("n_heads") else None
    print(markdown_table(run(resolved.config, args.checkpoints, args.output, n_heads=n_heads)))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
