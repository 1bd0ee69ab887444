"""The one list of settings: names, defaults, units, help texts and checks.

Every field of `TrainConfig` is a flag of the command line and a key of the ``--config`` YAML. A
setting's value comes from the first of these that gives it: the command line, the YAML, the
metadata of the checkpoint that the run starts from, the default. `resolve` applies that order and
records which one it was.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from trainer.dates import expand_dates
from trainer.errors import UsageError
from trainer.schedules import ALPHA_RANGE, TEMPERATURE_RANGE, StepSchedule
from trainer.text_yaml import read_settings

COMMAND_LINE, CONFIG_FILE, CHECKPOINT, DEFAULT = (
    "command line",
    "--config",
    "checkpoint",
    "default",
)
REQUIRED = ("block_size", "teacher_name", "dataset_name")
AUTO = 0
"""``--micro_batch=auto`` as a number."""
DEFAULT_MICRO_BATCH = 8
_LARGEST_COUNT, _LARGEST_SEED = 2**31 - 1, 2**64 - 1
"""What 32 bits count; what torch's generators take."""


def _contexts(text: str) -> tuple[int, ...]:
    lengths: list[int] = []
    for piece in text.split(","):
        if not (piece.strip().isdecimal() and 0 < int(piece) <= _LARGEST_COUNT):
            raise UsageError(
                f"--eval_ctx_lens={text!r}: {piece.strip()!r} is not a positive whole number of"
                " tokens; write for example 512,1024"
            )
        lengths.append(int(piece))
    return tuple(sorted(set(lengths)))


def _micro_batch(text: str) -> int:
    if text.strip() == "auto":
        return AUTO
    if (windows := int(text)) < 1:
        raise UsageError(f"--micro_batch={windows} must be at least 1, or auto")
    return windows


def _betas(text: str) -> tuple[float, float]:
    try:
        first, second = (float(piece) for piece in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(
            f"--betas={text!r}: two numbers are needed, for example 0.9 0.95"
        ) from None
    return first, second


_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word not in (*_TRUE, *_FALSE):
        raise ValueError("true or false is needed")
    return word in _TRUE


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    parse: Callable[[str], Any] | None = None,
    secret: bool = False,
    defines_run: bool = True,
) -> Any:
    """A dataclass field with what the command line needs to know of it.

    Args:
        default: the value when nothing gives one.
        help: one line, with the unit.
        choices: the only values allowed.
        parse: from text to value, where the type alone does not tell.
        secret: never shown.
        defines_run: False for settings that do not change what is computed (paths, intervals,
            credentials); the others must stay the same for a run to go on from its own snapshots.
    """
    return field(
        default=default,
        repr=not secret,
        metadata={
            "help": help,
            "choices": choices,
            "parse": parse,
            "secret": secret,
            "defines_run": defines_run and not secret,
        },
    )


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run. Construction checks the values.

    Raises:
        UsageError: naming the setting, its value and what is allowed.
    """

    # What is trained on what
    teacher_name: str | None = setting(
        None, "teacher: a Hugging Face causal LM by hub name or local directory (required)"
    )
    dataset_name: str | None = setting(
        None,
        "data set: hub name, or a local directory or file of text, json or parquet (required"
        " unless --tokens_dir is given)",
    )
    dataset_config: str | None = setting(
        None, "configuration of the data set, e.g. wikitext-103-v1"
    )
    dataset_revision: str | None = setting(
        None, "revision of a hub data set (commit, tag or branch)"
    )
    text_column: str = setting("text", "column of the data set that holds the text")
    block_size: int | None = setting(None, "training context in tokens (required)")
    resume_gcs_uri: str | None = setting(
        None,
        "checkpoint to start from, gs:// or local; it starts a new phase",
        defines_run=False,
    )

    # Annealing
    alpha: float = setting(0.5, "weight of the distillation term before the schedule's first entry")
    T: float = setting(1.0, "distillation temperature before the schedule's first entry")
    alpha_schedule: str = setting("", "alpha by update, e.g. 0:0.7,400:0.5")
    temp_schedule: str = setting("", "temperature by update, e.g. 0:1.2,800:1.0")
    kd_scheme: str = setting(
        "forward_kl",
        "divergence between teacher and student",
        choices=("forward_kl", "reverse_kl", "jsd"),
    )
    eval_ctx_lens: tuple[int, ...] = setting(
        (),
        "contexts to evaluate at, in tokens, e.g. 512,1024; the training context always is",
        parse=_contexts,
        defines_run=False,
    )
    reset_optim_on_ctx_change: bool = setting(
        False,
        "when --block_size differs from the checkpoint's, start at step 0 with a new optimizer",
    )

    # Student
    d_model: int = setting(768, "width of the student")
    n_layers: int = setting(10, "transformer blocks of the student")
    n_heads: int = setting(12, "attention heads of the student")
    dropout: float = setting(0.0, "dropout probability")
    pos_embedding: str = setting(
        "absolute", "learned position table or rotary positions", choices=("absolute", "rotary")
    )
    pos_resize: str = setting(
        "linear",
        "how a learned position table is stretched to a longer context",
        choices=("linear", "copy"),
    )
    rope_scale: float = setting(1.0, "divides the positions of a rotary student")
    trained_positions: int | None = setting(
        None,
        "rows of the checkpoint's position table that were trained, in place of what its metadata"
        " or its optimizer state tell",
    )

    # Optimization
    train_steps: int = setting(10_000, "optimizer updates; 0 loads, prints the settings and exits")
    global_batch: int = setting(64, "windows per update over all processes")
    micro_batch: int = setting(
        DEFAULT_MICRO_BATCH,
        "windows per forward pass of one process; auto is as many as the GPU's memory holds",
        parse=_micro_batch,
        defines_run=False,
    )
    grad_accum: int | None = setting(
        None,
        "micro-batches per update; wins over --global_batch (default: global_batch / (micro_batch"
        " x processes))",
        defines_run=False,
    )
    lr: float = setting(3e-4, "peak learning rate")
    lr_peak: float | None = setting(None, "peak learning rate; wins over --lr")
    warmup_steps: int = setting(2000, "updates of linear warmup")
    weight_decay: float = setting(0.1, "AdamW weight decay, on matrices only")
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW betas", parse=_betas)
    eps: float = setting(1e-8, "AdamW epsilon")
    grad_clip: float = setting(1.0, "largest gradient norm; larger ones are scaled down to it")
    max_nonfinite: int = setting(
        10, "updates in a row skipped for a non-finite gradient before the run gives up"
    )
    seed: int = setting(42, "seed of initialization, shuffling and dropout")

    # Precision
    bf16: bool = setting(False, "compute in bfloat16 (default: bf16 where the GPU has it)")
    fp16: bool = setting(False, "compute in float16 with loss scaling (default on older GPUs)")
    fp32: bool = setting(False, "compute in float32 (default on the CPU)")
    teacher_precision: str = setting(
        "auto",
        "precision of the teacher; auto is the student's compute precision; fp8 (GPT-2 alone) is"
        " faster, and logs at the start how far it is from bf16",
        choices=("auto", "fp32", "bf16", "fp16", "fp8"),
    )

    # Speed
    compile: str = setting(
        "auto",
        "torch.compile for student and teacher; auto is on for a GPU",
        choices=("auto", "on", "off"),
        defines_run=False,
    )
    parallel: str = setting(
        "ddp",
        "several GPUs: ddp replicates the student, fsdp shards it (FSDP2)",
        choices=("ddp", "fsdp"),
        defines_run=False,
    )
    shard_teacher: bool = setting(
        False, "shard the teacher's weights over the GPUs (FSDP2)", defines_run=False
    )
    activation_checkpointing: bool = setting(
        False, "recompute the student's activations in the backward pass", defines_run=False
    )

    # Evaluation, logging and checkpoints
    eval_every: int = setting(500, "updates between evaluations", defines_run=False)
    eval_max_tokens: int = setting(
        0, "tokens of the validation split to evaluate on; 0 is all of it"
    )
    save_every: int = setting(1000, "updates between snapshots", defines_run=False)
    save_best_on: str = setting(
        "val_loss_student", "metric that decides the best checkpoint; lower is better"
    )
    log_interval: int = setting(50, "updates between log lines", defines_run=False)

    # Places
    config: str | None = setting(None, "YAML file with any of these settings", defines_run=False)
    output_gcs_uri: str | None = setting(
        None,
        "where checkpoints go, gs:// or local; $(date +FORMAT) is expanded (default: the work"
        " directory)",
        defines_run=False,
    )
    local_workdir: str = setting("/tmp/liquid_work", "scratch directory", defines_run=False)  # noqa: S108
    cache_dir: str = setting(
        "~/.cache/liquid_annealing", "where tokenized data sets are kept", defines_run=False
    )
    tokens_dir: str | None = setting(
        None,
        "token streams written by trainer.prepare_tokens, gs:// or local, in place of a data set",
        defines_run=False,
    )

    # Hugging Face token, in the order of trying (after HF_TOKEN in the environment)
    hf_token_value: str | None = setting(None, "Hugging Face token itself", secret=True)
    hf_token_file: str | None = setting(
        None, "file that holds the Hugging Face token", defines_run=False
    )
    hf_token_gcs_uri: str | None = setting(
        None, "object that holds the Hugging Face token, gs:// or local", defines_run=False
    )
    hf_secret_name: str | None = setting(
        None,
        "Secret Manager secret with the Hugging Face token: projects/P/secrets/S[/versions/V]",
        defines_run=False,
    )

    def __post_init__(self) -> None:
        self.schedule_alpha, self.schedule_T  # noqa: B018 - parsed now, so that errors come early
        self._check_ranges()
        chosen = [name for name in ("fp16", "bf16", "fp32") if getattr(self, name)]
        if len(chosen) > 1:
            flags = " and ".join(f"--{name}" for name in chosen)
            raise UsageError(
                f"{flags} exclude each other; give one, or none for the best available"
            )
        if self.teacher_precision == "fp8" and self.shard_teacher:
            raise UsageError(
                "--teacher_precision=fp8 and --shard_teacher exclude each other; leave one out"
            )
        for name in ("local_workdir", "cache_dir", "text_column"):
            if not getattr(self, name):
                raise UsageError(f"--{name} must not be empty")
        if not self.resume_gcs_uri:
            self._check_shapes()  # else the checkpoint's are what counts

    def _check_shapes(self) -> None:
        if self.d_model % self.n_heads:
            raise UsageError(
                f"--d_model={self.d_model} is not divisible by --n_heads={self.n_heads}"
            )
        if self.pos_embedding == "rotary" and self.d_model // self.n_heads % 2:
            raise UsageError(
                f"rotary positions need an even head width, not {self.d_model}/{self.n_heads} ="
                f" {self.d_model // self.n_heads}; change --d_model or --n_heads"
            )
        if self.rope_scale != 1.0 and self.pos_embedding != "rotary":
            raise UsageError(
                f"--rope_scale={self.rope_scale:g} is for rotary positions; leave it out or give"
                " --pos_embedding=rotary"
            )

    def _check_ranges(self) -> None:
        for names, low, unit in (
            (("block_size", "d_model", "n_layers", "n_heads", "global_batch"), 1, ""),
            (("grad_accum", "trained_positions", "max_nonfinite"), 1, ""),
            (("eval_every", "save_every", "log_interval"), 1, " updates"),
            (("train_steps", "warmup_steps"), 0, " updates"),
            (("eval_max_tokens", "seed", "micro_batch"), 0, ""),
        ):
            for name in names:
                _check_between(name, getattr(self, name), low, unit)
        if not 0.0 <= self.weight_decay < math.inf:
            raise UsageError(f"--weight_decay={self.weight_decay:g} must be a number from 0 on")
        for name in ("lr", "lr_peak", "eps", "grad_clip", "rope_scale"):
            value = getattr(self, name)
            if value is not None and not (0.0 < value < math.inf):
                raise UsageError(f"--{name}={value:g} must be above 0 and finite")
        if self.alpha not in ALPHA_RANGE:
            raise UsageError(f"--alpha={self.alpha:g} must be {ALPHA_RANGE}")
        if self.T not in TEMPERATURE_RANGE:
            raise UsageError(f"--T={self.T:g} must be {TEMPERATURE_RANGE}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"--dropout={self.dropout:g} must be at least 0 and below 1")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UsageError(f"--betas={self.betas}: both must be at least 0 and below 1")

    @property
    def schedule_alpha(self) -> StepSchedule:
        """The weight of the distillation term by update."""
        return StepSchedule.parse(
            self.alpha_schedule, self.alpha, name="alpha_schedule", allowed=ALPHA_RANGE
        )

    @property
    def schedule_T(self) -> StepSchedule:
        """The distillation temperature by update."""
        return StepSchedule.parse(
            self.temp_schedule, self.T, name="temp_schedule", allowed=TEMPERATURE_RANGE
        )

    @property
    def peak_lr(self) -> float:
        """``lr_peak`` where given, else ``lr``."""
        return self.lr if self.lr_peak is None else self.lr_peak

    @property
    def contexts(self) -> tuple[int, ...]:
        """Every context that is evaluated, ascending, the training context among them."""
        return tuple(sorted({*self.eval_ctx_lens, self.context}))

    @property
    def context(self) -> int:
        """The training context in tokens."""
        assert self.block_size is not None, "require() was not called"
        return self.block_size

    @property
    def teacher(self) -> str:
        """The teacher's name or directory."""
        assert self.teacher_name is not None, "require() was not called"
        return self.teacher_name

    @property
    def needs_teacher(self) -> bool:
        """Whether any update of the schedule has alpha above 0."""
        return any(value > 0.0 for value in self.schedule_alpha.values())

    @property
    def student_metrics(self) -> tuple[str, ...]:
        """Every metric of the student that this run's evaluations give; lower is better."""
        names = ("val_loss_student", "val_ppl_student")
        return (*names, *(f"{name}@{context}" for name in names for context in self.contexts))

    @property
    def uri(self) -> str:
        """Where the run's checkpoints live."""
        return self.output_gcs_uri or self.local_workdir

    def require(self, *names: str) -> TrainConfig:
        """Itself, if every setting named has a value.

        Raises:
            UsageError: naming all that are missing at once.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if self.tokens_dir and "dataset_name" in missing:
            missing.remove("dataset_name")
        if missing:
            raise UsageError(
                f"missing: {', '.join('--' + name for name in missing)}; give"
                f" {'them' if len(missing) > 1 else 'it'} on the command line or in --config"
            )
        return self

    def run_settings(self) -> dict[str, Any]:
        """The settings that define what a run computes, as JSON types."""
        return {
            spec.name: list(value) if isinstance(value, tuple) else value
            for spec in fields(self)
            if spec.metadata["defines_run"]
            for value in [getattr(self, spec.name)]
        }


def _check_between(name: str, value: int | None, low: int, unit: str) -> None:
    high = _LARGEST_SEED if name == "seed" else _LARGEST_COUNT
    if value is not None and value < low:
        raise UsageError(f"--{name}={value} must be at least {low}{unit}")
    if value is not None and value > high:
        shown = f"{str(value)[:24]}…" if len(str(value)) > 24 else value
        raise UsageError(f"--{name}={shown} must be at most {high}{unit}")


SETTINGS = {spec.name: spec for spec in fields(TrainConfig)}
_TYPES = typing.get_type_hints(TrainConfig)
_SECRET_FLAGS = tuple(f"--{name}" for name, spec in SETTINGS.items() if spec.metadata["secret"])


@dataclass(frozen=True)
class Resolved:
    """A configuration, and for every setting which layer gave it."""

    config: TrainConfig
    sources: Mapping[str, str]

    def given(self, name: str) -> bool:
        """Whether the user gave the setting, on the command line or in the YAML."""
        return self.sources[name] in (COMMAND_LINE, CONFIG_FILE)

    def lines(self) -> Iterable[str]:
        """``name = value (source)`` for every setting; secrets are not shown."""
        for name, spec in SETTINGS.items():
            value = getattr(self.config, name)
            shown = "auto" if (name, value) == ("micro_batch", AUTO) else repr(value)
            if spec.metadata["secret"] and value is not None:
                shown = "***"
            yield f"{name} = {shown} ({self.sources[name]})"


def parse_value(name: str, value: Any) -> Any:
    """A setting's value from text (command line) or from a YAML scalar or list.

    Raises:
        UsageError: the value is not of the setting's type or not one of its choices.
    """
    spec, kind = SETTINGS[name], _TYPES[name]
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    if typing.get_origin(kind) is not tuple and options:
        kind = options[0]
    secret = spec.metadata["secret"]
    if isinstance(value, dict) or (isinstance(value, list) and not spec.metadata["parse"]):
        shown = "***" if secret else repr(value)
        raise UsageError(f"--{name}={shown}: one value is needed, not a {type(value).__name__}")
    if value == "" and type(None) in typing.get_args(_TYPES[name]):
        return None
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON and YAML know one kind of number
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    parse = spec.metadata["parse"] or (_boolean if kind is bool else kind)
    try:
        parsed = parse(text)
    except ValueError as error:
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, error)
        shown = "***" if secret else repr(text)
        raise UsageError(f"--{name}={shown}: {wanted} is needed") from None
    choices = spec.metadata["choices"]
    if choices and parsed not in choices:
        near = difflib.get_close_matches(text, choices, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"--{name}={text!r}: choose one of {', '.join(choices)}{hint}")
    return parsed


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors in one line that shows no value of a secret."""

    def __init__(self, prog: str, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, **options)

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError` where argparse prints its usage and exits."""
        raise UsageError(f"{message} (see --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; of what it does not know, flags are shown without their values."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return parsed
        first = unknown[0].partition("=")[0]
        if not first.startswith("-"):
            secret = any(word.startswith(_SECRET_FLAGS) for word in args or ())
            self.error(f"unexpected argument {'***' if secret else repr(first)}")
        flags = [text for action in self._actions for text in action.option_strings]
        near = difflib.get_close_matches(first, flags, 1)
        return self.error(f"unknown flag {first}{f'; did you mean {near[0]}?' if near else ''}")


def as_text(name: str, value: Any) -> str:
    """A setting's value as `parse_value` reads it."""
    if (name, value) == ("micro_batch", AUTO):
        return "auto"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def build_parser(
    prog: str, description: str, *, only: Iterable[str] | None = None
) -> argparse.ArgumentParser:
    """A parser with one flag per setting (``only`` those named), defaults left out.

    A flag that is not given is absent from the namespace, so that the layers can be told apart.
    """
    parser = OneLineParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name in SETTINGS if only is None else only:
        spec = SETTINGS[name]
        default = spec.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        suffix = "" if default in (None, "", ()) or default is False else f" [{shown}]"
        choices = spec.metadata["choices"]
        options: dict[str, Any] = {"metavar": "|".join(choices) if choices else _metavar(name)}
        if _TYPES[name] is bool:
            options = {"metavar": "BOOL", "nargs": "?", "const": "true"}
        elif name == "betas":
            options = {"metavar": "BETA", "nargs": "+"}
        text = (spec.metadata["help"] + suffix).replace("%", "%%")
        parser.add_argument(f"--{name}", help=text, **options)
    return parser


def _metavar(name: str) -> str:
    if name == "micro_batch":
        return "N|auto"
    kind = str(_TYPES[name])
    return "N" if "int" in kind else "X" if "float" in kind else "TEXT"


def settings_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave, parsed."""
    return {
        name: parse_value(name, value) for name, value in vars(args).items() if name in SETTINGS
    }


def given(**values: Any) -> dict[str, Any]:
    """Those settings that have a value, parsed; empty text and None leave one to its default.

    Raises:
        UsageError: there is no such setting, or a value is not one that its setting can take.
    """
    _check_names(values)
    return {
        name: parse_value(name, value)
        for name, value in values.items()
        if value is not None and value != ""
    }


def settings_from_yaml(path: str) -> dict[str, Any]:
    """The settings of a ``--config`` file; null leaves a setting to the next layer.

    Raises:
        UsageError: the file cannot be read, is not a mapping, or has an unknown key.
    """
    content = read_settings(path, f"--config={path!r}")
    _check_names(content, where=f"--config={path!r}: ")
    return given(**content)


def _check_names(names: Iterable[Any], where: str = "") -> None:
    for name in names:
        if name == "config":
            raise UsageError(f"{where}'config' names a file, which the command line alone gives")
        if name not in SETTINGS:
            near = difflib.get_close_matches(str(name), SETTINGS, 1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{where}unknown setting {name!r}{hint}")


def resolve(
    command_line: Mapping[str, Any],
    config_file: Mapping[str, Any],
    checkpoint: Mapping[str, Any] | None = None,
    *,
    now: float | None = None,
) -> Resolved:
    """Merge the layers: command line over YAML over checkpoint metadata over default.

    ``now`` is the time that ``$(date …)`` stands for, in seconds since 1970; default this moment.

    Raises:
        UsageError: the merged values do not work.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(SETTINGS, DEFAULT)
    for source, layer in (
        (CHECKPOINT, checkpoint or {}),
        (CONFIG_FILE, config_file),
        (COMMAND_LINE, command_line),
    ):
        for name, value in layer.items():
            values[name], sources[name] = value, source
        # One quantity under two names: the layer that gives either decides both
        for name, rival in (("grad_accum", "global_batch"), ("lr_peak", "lr")):
            if rival in layer and name not in layer and sources[name] != DEFAULT:
                values.pop(name, None)
                sources[name] = DEFAULT
        # A checkpoint's schedule would leave nothing of the constant that a user gives
        for name, constant in (("alpha_schedule", "alpha"), ("temp_schedule", "T")):
            if source != CHECKPOINT and constant in layer and sources[name] == CHECKPOINT:
                values.pop(name, None)
                sources[name] = DEFAULT
    for name in ("output_gcs_uri", "local_workdir", "cache_dir"):
        if str(values.get(name, "")).startswith("~"):
            values[name] = _in_home(name, values[name])
    for name in ("output_gcs_uri", "local_workdir"):
        if values.get(name):
            moment = None if now is None else datetime.fromtimestamp(now, UTC)
            values[name] = expand_dates(values[name], flag=name, now=moment)
    return Resolved(TrainConfig(**values), sources)


def _in_home(name: str, path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise UsageError(f"--{name}={path!r}: there is no such home directory") from None


def for_evaluation(config: TrainConfig) -> TrainConfig:
    """The settings that the evaluation stage goes by.

    Raises:
        UsageError: one is missing, or is not for that stage.
    """
    if not config.eval_ctx_lens:
        raise UsageError("missing: --eval_ctx_lens; give contexts in tokens, for example 512,1024")
    if config.teacher_precision == "fp8":
        raise UsageError(
            "--teacher_precision=fp8 is for training, where it is fast; the losses of this stage"
            " are the teacher's own: give fp32, bf16, fp16 or auto"
        )
    config = replace(
        config,
        block_size=max(config.eval_ctx_lens),
        micro_batch=config.micro_batch or DEFAULT_MICRO_BATCH,
    )
    return config.require("teacher_name", "dataset_name")


def accumulation(resolved: Resolved, world_size: int) -> int:
    """Micro-batches per update on each process; `AUTO` where ``micro_batch`` is yet to be found.

    ``grad_accum`` wins where given; else it is ``global_batch / (micro_batch × world_size)``.

    Raises:
        UsageError: the division leaves a remainder, or both were given and disagree.
    """
    config = resolved.config
    if config.micro_batch == AUTO:
        _check_auto(resolved, world_size)
        return AUTO
    per_pass = config.micro_batch * world_size
    shown = f"micro_batch {config.micro_batch} x {world_size} process{'es' * (world_size > 1)}"
    if config.grad_accum is not None:
        implied = config.grad_accum * per_pass
        if resolved.given("global_batch") and config.global_batch != implied:
            raise UsageError(
                f"--grad_accum={config.grad_accum} x {shown} is {implied} windows per update, but"
                f" --global_batch={config.global_batch}; leave one of them out"
            )
        return config.grad_accum
    if config.global_batch % per_pass:
        raise UsageError(
            f"--global_batch={config.global_batch} is not divisible by {shown}; change one of them"
            " or give --grad_accum"
        )
    return config.global_batch // per_pass


def _check_auto(resolved: Resolved, world_size: int) -> None:
    config = resolved.config
    if config.grad_accum is not None and not resolved.given("grad_accum"):
        raise UsageError(
            "--micro_batch=auto follows from --global_batch, of which the checkpoint tells only"
            f" grad_accum {config.grad_accum}; give --global_batch"
        )
    if config.grad_accum is not None:
        raise UsageError(
            f"--micro_batch=auto follows from --global_batch; leave out --grad_accum"
            f"={config.grad_accum}, or give a number for --micro_batch"
        )
    if config.global_batch % world_size:
        raise UsageError(
            f"--global_batch={config.global_batch} is not divisible by {world_size} processes;"
            " change it"
        )
    if world_size > 1 and (config.parallel == "fsdp" or config.shard_teacher):
        raise UsageError(
            "--micro_batch=auto works where each process holds the whole model, not with"
            " --parallel=fsdp or --shard_teacher; give a number"
        )


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run a command's body; turn its failure into one line on stderr and an exit status."""
    from trainer.log import report_failure
    from trainer.signals import ending_on_sigterm

    try:
        with ending_on_sigterm():
            command(sys.argv[1:] if argv is None else argv)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - reported, or raised again
        return report_failure(error)
    return os.EX_OK
