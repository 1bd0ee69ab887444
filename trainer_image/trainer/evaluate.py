"""Evaluate checkpoints at several contexts, and the teacher beside them.

    python -m trainer.evaluate OUT_DIR CHECKPOINT [CHECKPOINT …] --teacher_name=… \
        --dataset_name=… --eval_ctx_lens=512,1024
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trainer.data.streams import streams_for
from trainer.metrics.evaluated import METRICS_JSON, EvaluationRow, markdown_table
from trainer.models.teacher import load_teacher, read_teacher_spec
from trainer.runtime.commands import run_command
from trainer.runtime.log import quiet_libraries, set_up_logging
from trainer.runtime.strict_json import dumps
from trainer.settings.config import SETTINGS, TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.hf_token import find_hf_token
from trainer.settings.layers import for_evaluation, resolve
from trainer.storage.places import check_output
from trainer.storage.publish import publishing
from trainer.training.evaluation import Evaluator, check_contexts
from trainer.training.evaluation_rows import Candidate
from trainer.training.precision import choose_precision
from trainer.training.start import check_vocabularies


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
    candidates = [Candidate.load(uri, config, n_heads) for uri in checkpoints]
    streams = streams_for(config, token)
    longest = max((candidate.longest for candidate in candidates), default=0)
    check_contexts(config.eval_ctx_lens, longest, streams, config.eval_max_tokens)
    spec = read_teacher_spec(config.pretrained, token)
    for candidate in candidates:
        size = candidate.student.config.vocab_size
        check_vocabularies(size, streams.info.vocab_size, spec.vocab_size, candidate.uri)
    teacher = load_teacher(spec, dtype=precision.teacher, device=precision.device, token=token)
    evaluator = Evaluator(config, streams, teacher, precision)
    rows = [row for candidate in candidates for row in candidate.rows(evaluator)]
    workdir = Path(config.local_workdir)
    with publishing(output, last="metrics.md", workdir=workdir, replacing=True) as directory:
        text = dumps([asdict(row) for row in rows], indent=2)
        (directory / METRICS_JSON).write_text(text, encoding="utf-8")
        (directory / "metrics.md").write_text(markdown_table(rows), encoding="utf-8")
    return rows


FLAGS = [
    name
    for name in SETTINGS
    if name in ("teacher_precision", "text_column", "cache_dir", "tokens_dir")
    or name in ("eval_ctx_lens", "eval_max_tokens", "micro_batch", "pos_resize", "local_workdir")
    or name in ("n_heads", "trained_positions", "bf16", "fp16", "fp32")
    or name.startswith(("teacher_name", "teacher_revision", "dataset_", "hf_"))
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
