"""Evaluation at several contexts, in training and as a stage of its own.

    python -m trainer.evaluate OUT_DIR CHECKPOINT [CHECKPOINT …] --teacher_name=… \
        --dataset_name=… --eval_ctx_lens=512,1024
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.snapshots import read_from
from trainer.data.streams import streams_for
from trainer.models.student import Student
from trainer.models.teacher import load_teacher, read_teacher_spec
from trainer.runtime.commands import run_command
from trainer.runtime.log import log_values, quiet_libraries, set_up_logging
from trainer.runtime.strict_json import dumps
from trainer.settings.config import SETTINGS, TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.hf_token import find_hf_token
from trainer.settings.layers import for_evaluation, resolve
from trainer.storage.places import check_output
from trainer.storage.publish import publishing
from trainer.training.evaluation import Evaluator, check_contexts, perplexity
from trainer.training.precision import choose_precision
from trainer.training.start import check_vocabularies


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
        return self.checkpoint.context


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
    config = for_evaluation(config, "teacher_name", "dataset_name")
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
    _write(rows, output, Path(config.local_workdir))
    return rows


def _load_student(uri: str, config: TrainConfig, n_heads: int | None) -> _Loaded:
    """A checkpoint with its student and the number of its trained positions."""
    checkpoint = read_from(uri, Path(config.local_workdir))
    shapes = replace(checkpoint.student_config(n_heads), dropout=0.0)
    trained = checkpoint.trained_positions(config.trained_positions, required=True)
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


def _write(rows: Sequence[EvaluationRow], output: str, workdir: Path) -> None:
    with publishing(output, last="metrics.md", workdir=workdir, replacing=True) as directory:
        text = dumps([asdict(row) for row in rows], indent=2)
        (directory / "metrics.json").write_text(text, encoding="utf-8")
        (directory / "metrics.md").write_text(markdown_table(rows), encoding="utf-8")


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
    settings = settings_from_args(args)
    config, n_heads = resolve(settings, {}).config, settings.get("n_heads")
    print(markdown_table(run(config, args.checkpoints, args.output, n_heads=n_heads)))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
