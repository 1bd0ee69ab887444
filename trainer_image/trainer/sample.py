"""Let a student, and its teacher if asked, write on from prompts.

    python -m trainer.sample CHECKPOINT --prompt="Once upon a time" --with_teacher --seed=7
    python -m trainer.sample EXPORTED_DIR --prompt_file=prompts.txt --json

``CHECKPOINT`` is a checkpoint or what `trainer.export_hf` made of one, local or ``gs://``.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trainer import export_hf
from trainer.checkpoints.metadata import teacher_of
from trainer.models.causal_lm import load_causal_lm
from trainer.models.exported import exported_student
from trainer.models.hugging_face import load_tokenizer
from trainer.models.pretrained import Pretrained
from trainer.models.teacher import read_teacher_spec
from trainer.runtime.commands import run_command
from trainer.runtime.errors import DataError, ModelError, UsageError
from trainer.runtime.log import log, quiet_libraries, set_up_logging
from trainer.runtime.messages import brief
from trainer.runtime.strict_json import dumps
from trainer.settings.config import SAMPLE_SETTINGS, SampleSettings, TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.hf_token import find_hf_token
from trainer.settings.layers import resolve
from trainer.storage.places import read_bytes
from trainer.training.precision import choose_precision

FLAGS = [*SAMPLE_SETTINGS, "seed", "teacher_revision", *export_hf.FLAGS, "bf16", "fp16", "fp32"]
_LIMIT = 1 << 20
"""Bytes of prompts."""


@dataclass(frozen=True)
class Sample:
    """A prompt, and how each model went on."""

    prompt: str
    student: str
    teacher: str | None = None


@dataclass(frozen=True)
class Writer:
    """A model that writes, and its tokenizer."""

    what: str
    """What messages call it."""
    model: Any
    tokenizer: Any
    longest: int | None
    """Tokens that a text and its prompt may have; None where the model sets no limit."""

    def encode(self, prompt: str, settings: SampleSettings) -> torch.Tensor:
        """The ids of a prompt ``[1, L]``.

        Raises:
            UsageError: the prompt has no token, or with what is to be written too many.
        """
        ids = self.tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
        length, room = ids.shape[1], settings.max_new_tokens
        if not prompt or not length:
            raise UsageError(f"prompt {brief(prompt)} is empty: it has no token; give some text")
        if self.longest is not None and length + room > self.longest:
            raise UsageError(
                f"prompt {brief(prompt)} has {length} tokens, which with --max_new_tokens={room} is"
                f" over the {self.longest} positions of the {self.what}; give a shorter one, or"
                " fewer new tokens"
            )
        return ids.long()

    @torch.inference_mode()
    def write(self, ids: torch.Tensor, settings: SampleSettings, seed: int) -> list[str]:
        """What follows ``[1, L]`` ids: ``num_return_sequences`` texts, without the prompt.

        Raises:
            ModelError: the model's logits are not finite.
        """
        from transformers import GenerationConfig, set_seed

        set_seed(seed % 2**32)
        drawing = {name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")}
        own = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=not settings.greedy,
            num_return_sequences=settings.num_return_sequences,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            **({} if settings.greedy else drawing),
        )
        ids = ids.to(self.model.device)
        try:
            written = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=own
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise ModelError(
                f"the {self.what} computes logits that are not finite; it cannot write"
            ) from None
        texts = written[:, ids.shape[1] :].cpu()
        return [self.tokenizer.decode(text, skip_special_tokens=True) for text in texts]


def run(
    source: str,
    prompts: Sequence[str],
    settings: SampleSettings,
    config: TrainConfig,
    *,
    teacher: str | None = None,
    with_teacher: bool = False,
    **of_checkpoint: Any,
) -> list[Sample]:
    """Texts by a student and, if asked, by its teacher, in the order of the prompts.

    A text depends on its own prompt and the seed, not on the prompts beside it.

    Args:
        source: a checkpoint or an exported directory, local or ``gs://``.
        prompts: one text each or more, none of them empty.
        settings: how texts are written.
        config: ``seed``, ``teacher_revision``, precision, work and cache directory, and where the
            Hugging Face token is.
        teacher: hub name, local or ``gs://`` directory of a teacher to let write too.
        with_teacher: let the teacher of the checkpoint's metadata write too.
        of_checkpoint: ``tokenizer``, ``n_heads``, ``trained_positions`` and ``block_size`` of
            `trainer.export_hf.read_student`.

    Raises:
        UsageError: a prompt is empty, or too long for a model.
        LiquidError: a model cannot be loaded, or its tokenizer does not fit.
    """
    if not prompts:
        raise UsageError("there is no prompt; give --prompt or --prompt_file")
    if config.teacher_revision and not (teacher or with_teacher):
        raise UsageError(
            f"--teacher_revision={config.teacher_revision} is for a teacher; give --teacher or"
            " --with_teacher too"
        )
    precision, token = choose_precision(config), find_hf_token(config)
    student, metadata = _student(source, config, token, of_checkpoint)
    # Whatever is wrong with a prompt is told before a teacher is loaded
    ids = [student.encode(prompt, settings) for prompt in prompts]
    writers = [(student, ids)]
    if teacher or with_teacher:
        of_teacher = _teacher(teacher, source, metadata, config)
        writer = _writer("teacher", of_teacher, precision.teacher, precision.device, token)
        writers.append((writer, [writer.encode(prompt, settings) for prompt in prompts]))
    student.model.to(precision.device, precision.compute)
    texts = [
        [writer.write(prompt, settings, config.seed) for prompt in encoded]
        for writer, encoded in writers
    ]
    return [
        Sample(prompt, *together)
        for prompt, *of_prompt in zip(prompts, *texts, strict=True)
        for together in zip(*of_prompt, strict=True)
    ]


def _student(
    source: str, config: TrainConfig, token: str | None, of_checkpoint: dict[str, Any]
) -> tuple[Writer, dict[str, Any]]:
    """The student, and the metadata of its checkpoint; none of an exported directory."""
    if (exported := exported_student(source, config.cache_dir)) is None:
        read = export_hf.read_student(
            source,
            token=token,
            workdir=config.local_workdir,
            cache_dir=config.cache_dir,
            **of_checkpoint,
        )
        return Writer("student", read.model, read.tokenizer, read.positions), read.source.meta
    for name, value in of_checkpoint.items():
        if value is not None and name != "tokenizer":
            raise UsageError(f"--{name}={value} is for checkpoints; {source} is an exported model")
    own = of_checkpoint.get("tokenizer")
    tokenizer = Pretrained(own, cache_dir=config.cache_dir) if own else None
    cpu = torch.device("cpu")
    return _writer("student", exported, torch.float32, cpu, token, tokenizer), {}


def _teacher(
    name: str | None, source: str, metadata: dict[str, Any], config: TrainConfig
) -> Pretrained:
    """The teacher of that name, else the one that the metadata of ``source`` names."""
    if name:
        return Pretrained(name, config.teacher_revision, config.cache_dir)
    named = teacher_of(metadata, config.cache_dir)
    if named is None:
        raise UsageError(f"--with_teacher: {source} does not name its teacher; give --teacher")
    return replace(named, revision=config.teacher_revision or named.revision)


def _writer(
    what: str,
    pretrained: Pretrained,
    dtype: torch.dtype,
    device: torch.device,
    token: str | None,
    tokenizer: Pretrained | None = None,
) -> Writer:
    """A model of `transformers` that writes; its tokenizer is its own by default."""
    spec = read_teacher_spec(pretrained, token, what=what)
    found = spec.model or pretrained
    loaded = load_tokenizer(tokenizer or found, token)
    if len(loaded) > spec.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(loaded)} tokens, {what} {pretrained.name!r} a vocabulary of"
            f" {spec.vocab_size}; give the tokenizer that it was trained with"
        )
    model = load_causal_lm(what, found, dtype=dtype, device=device, token=token)
    return Writer(what, model.eval(), loaded, spec.max_context)


def read_prompts(place: str) -> list[str]:
    """The lines of a file, local or ``gs://``, or of the standard input (``-``); none is empty.

    Raises:
        DataError: it is too long, no text, or has no line.
        StorageError: it cannot be read.
    """
    data = sys.stdin.buffer.read(_LIMIT + 1) if place == "-" else read_bytes(place, limit=_LIMIT)
    what = "the standard input" if place == "-" else place
    if len(data) > _LIMIT:
        raise DataError(f"{what} has more than {_LIMIT} bytes of prompts; give fewer")
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is no UTF-8 text: byte {error.start}") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{what} has no prompt; write one a line")
    return prompts


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("python -m trainer.sample", str(__doc__), only=FLAGS)
    parser.add_argument(
        "source", metavar="CHECKPOINT", help="a checkpoint or an exported directory, or gs:// URI"
    )
    texts = {
        "tokenizer": "hub name, local or gs:// directory [of the checkpoint]",
        "prompt_file": "file of prompts, one a line; - is the standard input",
        "teacher": "let this teacher write too: hub name, local or gs:// directory",
    }
    for name, text in texts.items():
        parser.add_argument(f"--{name}", help=text, default=None)
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to go on from; may be repeated"
    )
    for name, text in {
        "with_teacher": "let the teacher that the checkpoint names write too",
        "json": 'print [{"prompt", "student", "teacher"}]',
    }.items():
        parser.add_argument(f"--{name}", action="store_true", default=False, help=text)
    return parser


def main(argv: list[str]) -> None:
    """The command line; prints the texts."""
    args = _parser().parse_args(argv)
    set_up_logging()
    quiet_libraries()
    given = settings_from_args(args)
    settings = SampleSettings(**{n: given.pop(n) for n in SAMPLE_SETTINGS if n in given})
    resolved = resolve(given, {})
    prompts = [*args.prompt, *(read_prompts(args.prompt_file) if args.prompt_file else ())]
    samples = run(
        args.source,
        prompts,
        settings,
        resolved.config,
        teacher=args.teacher,
        with_teacher=args.with_teacher,
        tokenizer=args.tokenizer,
        **export_hf.of_checkpoint(resolved),
    )
    if args.json:
        print(dumps([vars(sample) for sample in samples], indent=2))
        return
    for sample in samples:
        print(f"── prompt\n{sample.prompt}\n── student\n{sample.student}")
        if sample.teacher is not None:
            print(f"── teacher\n{sample.teacher}")
    log.info("%d texts of %d prompts", len(samples), len(prompts))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
