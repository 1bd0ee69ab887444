"""Let the teacher go over the token stream once, and store its targets for any number of trainings.

    python -m trainer.teacher_targets OUT_DIR --teacher_name=gpt2-xl --tokens_dir=TOKENS \
        --target_temperatures=1.0,1.2 --eval_ctx_lens=512,1024

Several machines share the work where each is given another ``--worker``; a last command makes the
index over what they have made:

    python -m trainer.teacher_targets OUT_DIR … --workers=4 --worker=0
    python -m trainer.teacher_targets OUT_DIR --join=OUT_DIR

Started again after it was stopped, the same command goes on. Trainings take the targets by
``--teacher_targets=OUT_DIR``.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

from collections.abc import Sequence
from dataclasses import replace

from trainer.data.streams import TokenStreams, streams_for
from trainer.models.teacher import TeacherSpec, read_teacher_spec, teacher_digest
from trainer.runtime.commands import run_command
from trainer.runtime.errors import UsageError
from trainer.runtime.log import log, quiet_libraries, set_up_logging
from trainer.settings.config import SETTINGS, TARGET_SETTINGS, TargetSettings, TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.hf_token import find_hf_token
from trainer.settings.layers import resolve
from trainer.storage.places import check_output, open_location
from trainer.targets.making import join, make, missing, share
from trainer.targets.shards import ESTIMATOR, Index, MadeWith
from trainer.training.evaluation import check_contexts
from trainer.training.precision import Precision, choose_precision
from trainer.training.start import check_vocabularies
from trainer.training.teaching import prepared_teacher


def run(config: TrainConfig, settings: TargetSettings, output: str) -> Index | None:
    """Make targets, or a worker's share of them, at ``output``.

    Args:
        config: ``teacher_name``, a data set or ``tokens_dir``, ``eval_ctx_lens`` and ``seed``.
        settings: of the targets.
        output: a directory or ``gs://`` prefix, new or with some of the same targets.

    Returns:
        The index; None for one worker of several.

    Raises:
        LiquidError: the teacher or the tokens cannot be loaded or do not fit together, or the
            output holds something else or cannot be written.
    """
    config.require("teacher_name", "dataset_name")
    check_output(output)
    token = find_hf_token(config)
    spec = read_teacher_spec(config.pretrained, token)
    config = replace(config, block_size=_context(settings, spec))
    precision = choose_precision(config)
    streams = streams_for(config, token)
    made = _made_with(config, settings, spec, streams, precision, token)
    location, names = open_location(output), share(made, settings.workers, settings.worker or 0)
    absent = missing(location, made, names)
    words = "%s: %d of %d files of these targets are to be made here, %d of them are there already"
    log.info(words, output, len(names), len(made.files), len(names) - len(absent))
    if absent:
        teacher = prepared_teacher(config, spec, streams, precision, token)
        make(location, made, absent, streams, teacher)
    return None if settings.worker is not None else join_places(output, [output])


def join_places(output: str, places: Sequence[str]) -> Index:
    """Write the index over what workers have made; see `trainer.targets.making.join`."""
    check_output(output)
    index = join(output, places)
    made = index.made
    words = "%s: targets of %d tokens at T %s, %d bytes each, fingerprint %s"
    temperatures = ", ".join(f"{temperature:g}" for temperature in made.temperatures)
    log.info(words, output, made.places, temperatures, made.record_bytes, index.fingerprint)
    return index


def _context(settings: TargetSettings, spec: TeacherSpec) -> int:
    """Tokens of the teacher's windows.

    Raises:
        UsageError: they are more than the teacher takes, or nothing tells how many it takes.
    """
    context, longest = settings.teacher_context or spec.max_context, spec.max_context
    if context is None:
        raise UsageError(
            f"the configuration of teacher {spec.name!r} sets no longest context; give"
            " --teacher_context"
        )
    if longest is not None and context > longest:
        raise UsageError(
            f"--teacher_context={context} is over the {longest} positions of teacher"
            f" {spec.name!r}; give a smaller one"
        )
    return context


def _made_with(
    config: TrainConfig,
    settings: TargetSettings,
    spec: TeacherSpec,
    streams: TokenStreams,
    precision: Precision,
    token: str | None,
) -> MadeWith:
    info, longest = streams.info, spec.max_context
    check_vocabularies(info.vocab_size, None, spec.vocab_size, "the tokenizer")
    contexts = [n for n in config.contexts if longest is None or n <= longest]
    check_contexts(contexts, config.context, streams, 0)
    kind = "fp8" if precision.fp8_teacher else str(precision.teacher).removeprefix("torch.")
    try:
        return MadeWith(
            tokens=info.fingerprint,
            tokenizer=info.tokenizer_fingerprint,
            train_tokens=info.train_tokens,
            validation_tokens=info.validation_tokens,
            teacher=config.teacher,
            teacher_digest=teacher_digest(spec.model or config.pretrained, token),
            teacher_precision=kind,
            vocabulary=info.vocab_size,
            teacher_context=config.context,
            temperatures=settings.target_temperatures,
            record_bytes=settings.target_bytes,
            seed=config.seed,
            estimator=ESTIMATOR,
            contexts=tuple(contexts),
        )
    except ValueError as error:
        raise UsageError(f"no such targets can be made: {error}") from None


FLAGS = [
    name
    for name in SETTINGS
    if name in ("teacher_precision", "text_column", "cache_dir", "tokens_dir")
    or name in ("eval_ctx_lens", "seed", "bf16", "fp16", "fp32", "compile", "local_workdir")
    or name.startswith(("teacher_name", "teacher_revision", "dataset_", "hf_"))
]


def main(argv: list[str]) -> None:
    """The command line."""
    flags = [*TARGET_SETTINGS, *FLAGS]
    parser = build_parser("python -m trainer.teacher_targets", str(__doc__), only=flags)
    parser.add_argument(
        "output",
        metavar="OUT_DIR",
        help="a directory or gs:// prefix, new or with some of the same targets",
    )
    parser.add_argument(
        "--join",
        metavar="URI[,URI…]",
        help="make no targets, but the index over those that workers have made there",
    )
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    given = settings_from_args(args)
    own = {name: given.pop(name) for name in TARGET_SETTINGS if name in given}
    settings = TargetSettings(**own)
    if "join" not in args:
        run(resolve(given, {}).config, settings, args.output)
        return
    join_places(args.output, [place.strip() for place in args.join.split(",")])


if __name__ == "__main__":
    raise SystemExit(run_command(main))
