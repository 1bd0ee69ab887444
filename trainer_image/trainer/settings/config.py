"""The one list of settings: names, defaults, units, help texts and checks.

Every field of `TrainConfig` is a flag of the command line and a key of the ``--config`` YAML. A
setting's value comes from the first of these that gives it: the command line, the YAML, the
metadata of the checkpoint that the run starts from, the default. `trainer.settings.layers.resolve`
applies that order and records which layer it was. The fields of `TargetSettings` are flags of the
command that makes teacher targets, those of `SampleSettings` of the one that writes texts, and
those of `LmEvalSettings` of the one that runs tasks of lm-eval.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cached_property, partial
from typing import Any

from trainer.loss.divergences import DIVERGENCES, LINEAR_SCHEME
from trainer.models.positions import RESIZE_METHODS
from trainer.models.pretrained import Pretrained
from trainer.runtime.errors import UsageError
from trainer.runtime.messages import shortened
from trainer.settings.schedules import (
    ALPHA_RANGE,
    TEMPERATURE_RANGE,
    Range,
    StepSchedule,
    schedule_entries,
)
from trainer.storage.copies import DEFAULT_CACHE

REQUIRED = ("block_size", "teacher_name", "dataset_name")

AUTO = 0
"""``--micro_batch=auto`` as a number."""

DEFAULT_MICRO_BATCH = 8

NO_COMPILE_CACHE = "off"

DEFAULT_WORKDIR = f"{os.environ.get('TMPDIR') or '/tmp'}/liquid_work"  # noqa: S108
"""Below the directory that the system's programs keep their temporary files in."""

MOST_TEMPERATURES = 64
"""At which targets are made; each takes some bytes of every record."""

MAX_TARGET_BYTES = 4096
"""Of a record; a whole distribution in fp16 is not much longer."""

MOST_WORKERS = 10_000

MOST_TEXTS = 1000
"""For one prompt; they are written together."""

MAX_LAYERS, MAX_WIDTH = 512, 1 << 20
"""Of a student; beyond any that is known, and its checkpoints can still be read."""
_MOST_DIGITS = 100
"""Of a whole number; Python refuses thousands of them with a message of its own."""

_LARGEST_COUNT, _LARGEST_SEED = 2**31 - 1, 2**64 - 1
"""What 32 bits count; what torch's generators take."""

_SMALLEST, _LARGEST = 1e-30, 1e18
"""Between them, products and quotients of two settings are neither 0 nor infinite in float32."""

_Check = Callable[[str, Any], None]
"""Takes the name and the value of a setting; raises `UsageError`."""


def _whole(low: int, unit: str = "", high: int = _LARGEST_COUNT) -> _Check:
    def check(name: str, value: int) -> None:
        shown = f"{str(value)[:24]}…" if len(str(value)) > 24 else value
        if value < low:
            raise UsageError(f"--{name}={shown} must be at least {low}{unit}")
        if value > high:
            raise UsageError(f"--{name}={shown} must be at most {high}{unit}")

    return check


def _number(allowed: Callable[[float], bool], words: str) -> _Check:
    def check(name: str, value: float) -> None:
        if not allowed(value):
            raise UsageError(f"--{name}={value:g} must be {words}")

    return check


def _schedule(allowed: Range) -> _Check:
    def check(name: str, text: str) -> None:
        schedule_entries(text, name, allowed)

    return check


def _not_empty(name: str, text: str) -> None:
    if not text:
        raise UsageError(f"--{name} must not be empty")


def _check_betas(name: str, betas: tuple[float, float]) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise UsageError(f"--{name}={betas}: both must be at least 0 and below 1")


_COUNT, _FROM_0, _SEED = _whole(1), _whole(0), _whole(0, high=_LARGEST_SEED)
_LAYERS, _WIDTH = _whole(1, high=MAX_LAYERS), _whole(1, high=MAX_WIDTH)
_INTERVAL, _UPDATES = _whole(1, " updates"), _whole(0, " updates")
_ALPHA = _number(ALPHA_RANGE.__contains__, str(ALPHA_RANGE))
_TEMPERATURE = _number(TEMPERATURE_RANGE.__contains__, str(TEMPERATURE_RANGE))
_ALPHAS, _TEMPERATURES = _schedule(ALPHA_RANGE), _schedule(TEMPERATURE_RANGE)
_DECAY = _number(lambda value: 0.0 <= value <= _LARGEST, f"a number from 0 on, up to {_LARGEST:g}")
_PROBABILITY = _number(lambda value: 0.0 <= value < 1.0, "at least 0 and below 1")
_POSITIVE = _number(
    lambda value: _SMALLEST <= value <= _LARGEST,
    f"above 0 and finite, from {_SMALLEST:g} to {_LARGEST:g}",
)
_SCALE = _number(lambda value: 1e-6 <= value <= 1e6, "above 0, from 1e-06 to 1e+06")


def _contexts(text: str) -> tuple[int, ...]:
    lengths: list[int] = []
    for piece in text.split(","):
        digits = piece.strip()
        known = digits.isdecimal() and len(digits) <= _MOST_DIGITS
        if not (known and 0 < int(digits) <= _LARGEST_COUNT):
            raise UsageError(
                f"--eval_ctx_lens={text[:200]!r}: {digits[:24]!r} is not a positive whole number of"
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


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        found = sorted({float(piece) for piece in text.split(",")})
    except ValueError:
        raise UsageError(
            f"--target_temperatures={text[:200]!r}: numbers are needed, for example 1.0,1.2"
        ) from None
    return tuple(found)


def _check_temperatures(name: str, temperatures: tuple[float, ...]) -> None:
    if not 0 < len(temperatures) <= MOST_TEMPERATURES:
        raise UsageError(f"--{name}: {len(temperatures)} of them; give 1 to {MOST_TEMPERATURES}")
    for temperature in temperatures:
        _TEMPERATURE(name, temperature)


def _betas(text: str) -> tuple[float, float]:
    try:
        first, second = (float(piece) for piece in text.replace(",", " ").split())
    except ValueError:
        raise UsageError(
            f"--betas={text!r}: two numbers are needed, for example 0.9 0.95"
        ) from None
    return first, second


def setting(
    default: Any,
    help: str,
    check: _Check | None = None,
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
        check: refuses values outside the setting's range.
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
            "check": check,
            "secret": secret,
            "defines_run": defines_run and not secret,
        },
    )


technical = partial(setting, defines_run=False)
"""A setting that does not change what is computed: a place, an interval, a credential."""


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run. Construction checks the values.

    Raises:
        UsageError: naming the setting, its value and what is allowed.
    """

    # What is trained on what
    teacher_name: str | None = setting(
        None,
        "teacher: a Hugging Face causal LM by hub name, local or gs:// directory (required unless"
        " --teacher_targets is given)",
    )
    teacher_revision: str | None = setting(
        None,
        "revision of a hub teacher (commit, tag or branch); of a gs:// directory the digest that"
        " its files must have",
        _not_empty,
    )
    dataset_name: str | None = setting(
        None,
        "data set: hub name, or a local or gs:// directory or file of text, json or parquet"
        " (required unless --tokens_dir is given)",
    )
    dataset_config: str | None = setting(
        None, "configuration of the data set, e.g. wikitext-103-v1"
    )
    dataset_revision: str | None = setting(
        None,
        "revision of a hub data set (commit, tag or branch); of a gs:// directory the digest that"
        " its files must have",
    )
    text_column: str = setting("text", "column of the data set that holds the text", _not_empty)
    block_size: int | None = setting(None, "training context in tokens (required)", _COUNT)
    resume_gcs_uri: str | None = technical(
        None, "checkpoint to start from, gs:// or local; it starts a new phase"
    )

    # Annealing
    alpha: float = setting(
        0.5, "weight of the distillation term before the schedule's first entry", _ALPHA
    )
    T: float = setting(
        1.0, "distillation temperature before the schedule's first entry", _TEMPERATURE
    )
    alpha_schedule: str = setting("", "alpha by update, e.g. 0:0.7,400:0.5", _ALPHAS)
    temp_schedule: str = setting("", "temperature by update, e.g. 0:1.2,800:1.0", _TEMPERATURES)
    kd_scheme: str = setting(
        "forward_kl",
        "divergence between teacher and student",
        choices=tuple(DIVERGENCES),
    )
    eval_ctx_lens: tuple[int, ...] = technical(
        (),
        "contexts to evaluate at, in tokens, e.g. 512,1024; the training context always is",
        parse=_contexts,
    )
    reset_optim_on_ctx_change: bool = setting(
        False,
        "when --block_size differs from the checkpoint's, start at step 0 with a new optimizer",
    )

    # Student
    d_model: int = setting(768, "width of the student", _WIDTH)
    n_layers: int = setting(10, "transformer blocks of the student", _LAYERS)
    n_heads: int = setting(12, "attention heads of the student", _COUNT)
    dropout: float = setting(0.0, "dropout probability", _PROBABILITY)
    pos_embedding: str = setting(
        "absolute", "learned position table or rotary positions", choices=("absolute", "rotary")
    )
    pos_resize: str = setting(
        "linear",
        "how a learned position table is stretched to a longer context",
        choices=tuple(RESIZE_METHODS),
    )
    rope_scale: float = setting(1.0, "divides the positions of a rotary student", _SCALE)
    trained_positions: int | None = setting(
        None,
        "rows of the checkpoint's position table that were trained, in place of what its metadata"
        " or its optimizer state tell",
        _COUNT,
    )

    # Optimization
    train_steps: int = setting(
        10_000, "optimizer updates; 0 loads, prints the settings and exits", _UPDATES
    )
    stop_at: int | None = technical(
        None,
        "update after which the run pauses, evaluated and saved; started again with a later one or"
        " none it goes on (learning rate and schedules are those of all --train_steps)",
        _COUNT,
    )
    global_batch: int = setting(64, "windows per update over all processes", _COUNT)
    micro_batch: int = technical(
        DEFAULT_MICRO_BATCH,
        "windows per forward pass of one process; auto is as many as the GPU's memory holds",
        _FROM_0,
        parse=_micro_batch,
    )
    grad_accum: int | None = technical(
        None,
        "micro-batches per update; wins over --global_batch (default: global_batch / (micro_batch"
        " x processes))",
        _COUNT,
    )
    lr: float = setting(3e-4, "peak learning rate", _POSITIVE)
    lr_peak: float | None = setting(None, "peak learning rate; wins over --lr", _POSITIVE)
    warmup_steps: int = setting(2000, "updates of linear warmup", _UPDATES)
    weight_decay: float = setting(0.1, "AdamW weight decay, on matrices only", _DECAY)
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW betas", _check_betas, parse=_betas)
    eps: float = setting(1e-8, "AdamW epsilon", _POSITIVE)
    grad_clip: float = setting(
        1.0, "largest gradient norm; larger ones are scaled down to it", _POSITIVE
    )
    max_nonfinite: int = setting(
        10, "updates in a row skipped for a non-finite gradient before the run gives up", _COUNT
    )
    seed: int = setting(42, "seed of initialization, shuffling and dropout", _SEED)

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
    compile: str = technical(
        "auto",
        "torch.compile for student and teacher; auto is on for a GPU",
        choices=("auto", "on", "off"),
    )
    compile_cache: str | None = technical(
        None,
        "file of compiled code to start with, gs:// or local, such as compile_cache.bin of an"
        " earlier run's output; it is run, so name none that others may write; off keeps none at"
        " the output either",
    )
    parallel: str = technical(
        "ddp",
        "several GPUs: ddp replicates the student, fsdp shards it (FSDP2)",
        choices=("ddp", "fsdp"),
    )
    shard_teacher: bool = technical(False, "shard the teacher's weights over the GPUs (FSDP2)")
    activation_checkpointing: bool = technical(
        False, "recompute the student's activations in the backward pass"
    )

    # Evaluation, logging and checkpoints
    eval_every: int = technical(500, "updates between evaluations", _INTERVAL)
    eval_max_tokens: int = setting(
        0, "tokens of the validation split to evaluate on; 0 is all of it", _FROM_0
    )
    save_every: int = technical(1000, "updates between snapshots", _INTERVAL)
    save_best_on: str = setting(
        "val_loss_student", "metric that decides the best checkpoint; lower is better"
    )
    log_interval: int = technical(50, "updates between log lines", _INTERVAL)

    # Places
    config: str | None = technical(None, "YAML file with any of these settings")
    output_gcs_uri: str | None = technical(
        None,
        "where checkpoints go, gs:// or local; $(date +FORMAT) is expanded (default: the work"
        " directory)",
    )
    local_workdir: str = technical(DEFAULT_WORKDIR, "scratch directory", _not_empty)
    cache_dir: str = technical(
        DEFAULT_CACHE,
        "where tokenized data sets are kept, and teachers and data sets of gs:// directories",
        _not_empty,
    )
    tokens_dir: str | None = technical(
        None,
        "token streams written by trainer.prepare_tokens, gs:// or local, in place of a data set",
    )

    teacher_targets: str | None = technical(
        None,
        "targets written by trainer.teacher_targets, gs:// or local, in place of loading the"
        " teacher",
    )

    # Hugging Face token, in the order of trying (after HF_TOKEN in the environment)
    hf_token_value: str | None = setting(None, "Hugging Face token itself", secret=True)
    hf_token_file: str | None = technical(None, "file that holds the Hugging Face token")
    hf_token_gcs_uri: str | None = technical(
        None, "object that holds the Hugging Face token, gs:// or local"
    )
    hf_secret_name: str | None = technical(
        None, "Secret Manager secret with the Hugging Face token: projects/P/secrets/S[/versions/V]"
    )

    def __post_init__(self) -> None:
        check_values({spec.name: getattr(self, spec.name) for spec in fields(self)})

    @cached_property
    def schedule_alpha(self) -> StepSchedule:
        """The weight of the distillation term by update."""
        return StepSchedule.parse(
            self.alpha_schedule, self.alpha, name="alpha_schedule", allowed=ALPHA_RANGE
        )

    @cached_property
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
    def last_step(self) -> int:
        """Updates done when this start of the run ends: all of them, or where it pauses."""
        return self.train_steps if self.stop_at is None else self.stop_at

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
    def pretrained(self) -> Pretrained:
        """The teacher, with its revision and the place of its copies."""
        return Pretrained(self.teacher, self.teacher_revision, self.cache_dir)

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
        """Itself, if every setting named has a value; see `require`."""
        require(vars(self), *names)
        return self

    def run_settings(self) -> dict[str, Any]:
        """The settings that define what a run computes, as JSON types."""
        names = (spec.name for spec in fields(self) if spec.metadata["defines_run"])
        return {name: as_json(getattr(self, name)) for name in names}


def as_json(value: Any) -> Any:
    """A setting's value as it stands in metadata."""
    return list(value) if isinstance(value, tuple) else value


SETTINGS = {spec.name: spec for spec in fields(TrainConfig)}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Those of a run's settings that have another value now, each with both, for a message.

    Args:
        before: of the run as it began. A release that did not know a setting yet did what is its
            default now.
        now: as `TrainConfig.run_settings` gives them.
    """
    return [
        f"{name} {shortened(repr(before.get(name, default)))} -> {shortened(repr(value))}"
        for name, value in now.items()
        for default in [as_json(SETTINGS[name].default)]
        if before.get(name, default) != value
    ]


@dataclass(frozen=True)
class TargetSettings:
    """What the making of teacher targets goes by, beside those settings that training has too.

    Raises:
        UsageError: naming the setting, its value and what is allowed.
    """

    teacher_context: int | None = setting(
        None,
        "tokens of the windows that go through the teacher; a multiple of every --block_size to be"
        " trained at (default: the teacher's longest context)",
        _COUNT,
    )
    target_temperatures: tuple[float, ...] = setting(
        (1.0,),
        "distillation temperatures that can be trained at, e.g. 1.0,1.2",
        _check_temperatures,
        parse=_temperatures,
    )
    target_bytes: int = setting(64, "bytes of a token's targets", _whole(1, high=MAX_TARGET_BYTES))
    workers: int = setting(
        1, "how many of these commands share the work", _whole(1, high=MOST_WORKERS)
    )
    worker: int | None = setting(
        None,
        "which of --workers this one is, counted from 0; it makes its share and no index",
        _FROM_0,
    )

    def __post_init__(self) -> None:
        _check_each(vars(self), TARGET_SETTINGS)
        last = self.workers - 1
        if self.worker is not None and self.worker > last:
            raise UsageError(f"--worker={self.worker}: of --workers={self.workers}, {last} is last")
        if self.worker is None and self.workers > 1:
            raise UsageError(
                f"--workers={self.workers} needs --worker, from 0 to {last}; once all are done,"
                " --join makes the index"
            )


TARGET_SETTINGS = {spec.name: spec for spec in fields(TargetSettings)}


@dataclass(frozen=True)
class SampleSettings:
    """How texts are written, by the names and with the meaning of `transformers`' ``generate``.

    Raises:
        UsageError: naming the setting, its value and what is allowed.
    """

    max_new_tokens: int = setting(64, "tokens to write at most", _COUNT)
    greedy: bool = setting(False, "take the likeliest token each time, in place of drawing one")
    temperature: float = setting(1.0, "divides the logits before a token is drawn", _TEMPERATURE)
    top_k: int = setting(0, "draw from the so many likeliest tokens; 0 is all of them", _FROM_0)
    top_p: float = setting(
        1.0,
        "draw from the likeliest tokens that have this probability together",
        _number(lambda value: 0.0 < value <= 1.0, "above 0 and at most 1"),
    )
    num_return_sequences: int = setting(1, "texts for each prompt", _whole(1, high=MOST_TEXTS))

    def __post_init__(self) -> None:
        _check_each(vars(self), SAMPLE_SETTINGS)
        if not self.greedy:
            return
        for name in ("temperature", "top_k", "top_p", "num_return_sequences"):
            value, default = getattr(self, name), SAMPLE_SETTINGS[name].default
            if value != default:
                raise UsageError(f"--greedy draws nothing, so --{name}={value} is without effect")


SAMPLE_SETTINGS = {spec.name: spec for spec in fields(SampleSettings)}


def _names(text: str) -> tuple[str, ...]:
    return tuple(piece.strip() for piece in text.split(",") if piece.strip())


@dataclass(frozen=True)
class LmEvalSettings:
    """What lm-eval is asked for.

    Raises:
        UsageError: naming the setting, its value and what is allowed.
    """

    tasks: tuple[str, ...] = setting(
        (), "tasks of lm-eval, or YAML files of your own, separated by commas", parse=_names
    )
    limit: int = setting(0, "examples of each task; 0 is all of them", _FROM_0)

    def __post_init__(self) -> None:
        _check_each(vars(self), LM_EVAL_SETTINGS)


LM_EVAL_SETTINGS = {spec.name: spec for spec in fields(LmEvalSettings)}


def _check_each(values: Mapping[str, Any], settings: Mapping[str, Field[Any]]) -> None:
    for name, value in values.items():
        check = settings[name].metadata["check"]
        if check is not None and value is not None:
            check(name, value)


def check_values(values: Mapping[str, Any]) -> None:
    """Check each of some settings by itself, and those that exclude each other.

    Shapes are left out: those of a checkpoint count where a run starts from one.

    Raises:
        UsageError: naming the setting, its value and what is allowed.
    """
    _check_each(values, SETTINGS)
    precisions = [f"--{name}" for name in ("fp16", "bf16", "fp32") if values.get(name)]
    if len(precisions) > 1:
        raise UsageError(
            f"{' and '.join(precisions)} exclude each other; give one, or none for the best"
            " available"
        )
    stop, steps = values.get("stop_at"), values.get("train_steps")
    if stop and steps and stop > steps:
        raise UsageError(
            f"--stop_at={stop} is past the last of --train_steps={steps}; give a smaller one, or"
            " leave it out"
        )
    if values.get("teacher_precision") == "fp8" and values.get("shard_teacher"):
        raise UsageError(
            "--teacher_precision=fp8 and --shard_teacher exclude each other; leave one out"
        )
    if values.get("teacher_targets") and values.get("kd_scheme", LINEAR_SCHEME) != LINEAR_SCHEME:
        raise UsageError(
            f"--kd_scheme={values['kd_scheme']} needs the teacher itself: --teacher_targets hold"
            f" what {LINEAR_SCHEME} needs; leave one of them out"
        )


def check_shapes(values: Mapping[str, Any]) -> None:
    """Check that a student can be built from settings alone, without a checkpoint.

    Args:
        values: every setting.

    Raises:
        UsageError: naming the settings that do not fit together.
    """
    width, heads, positions = (values[name] for name in ("d_model", "n_heads", "pos_embedding"))
    if width % heads:
        raise UsageError(f"--d_model={width} is not divisible by --n_heads={heads}")
    if positions == "rotary" and width // heads % 2:
        raise UsageError(
            f"rotary positions need an even head width, not {width}/{heads} = {width // heads};"
            " change --d_model or --n_heads"
        )
    if values["rope_scale"] != 1.0 and positions != "rotary":
        raise UsageError(
            f"--rope_scale={values['rope_scale']:g} is for rotary positions; leave it out or give"
            " --pos_embedding=rotary"
        )


def require(values: Mapping[str, Any], *names: str) -> None:
    """Check that settings have a value.

    ``tokens_dir`` does for ``dataset_name``, and ``teacher_targets`` for ``teacher_name``.

    Raises:
        UsageError: naming all that are missing at once.
    """
    missing = [name for name in names if values[name] is None]
    for name, instead in (("dataset_name", "tokens_dir"), ("teacher_name", "teacher_targets")):
        if values[instead] and name in missing:
            missing.remove(name)
    if missing:
        raise UsageError(
            f"missing: {', '.join('--' + name for name in missing)}; give"
            f" {'them' if len(missing) > 1 else 'it'} on the command line or in --config"
        )
