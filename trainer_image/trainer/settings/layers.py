"""Where a setting's value comes from: command line, YAML, checkpoint metadata or default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from trainer.runtime.errors import UsageError
from trainer.runtime.messages import brief, shortened
from trainer.settings.config import AUTO, DEFAULT_MICRO_BATCH, SETTINGS, TrainConfig, check_values
from trainer.settings.dates import expand_dates
from trainer.settings.text_yaml import read_settings
from trainer.settings.values import check_names, given
from trainer.storage.files import in_home

COMMAND_LINE, CONFIG_FILE, CHECKPOINT, DEFAULT = "command line", "--config", "checkpoint", "default"

_SHOWN = 1000
"""Characters of a value in the log; metadata keeps all."""

DERIVED = "derived"
"""The source of a value that follows from others."""


@dataclass(frozen=True)
class Resolved:
    """The value of every setting, and which layer gave it."""

    values: Mapping[str, Any] = field(repr=False)  # a token among them
    sources: Mapping[str, str]

    @cached_property
    def config(self) -> TrainConfig:
        """The values as a configuration, built when it is first needed."""
        return TrainConfig(**self.values)

    def given(self, name: str) -> bool:
        """Whether the user gave the setting, on the command line or in the YAML."""
        return self.sources[name] in (COMMAND_LINE, CONFIG_FILE)

    def with_checkpoint(self, settings: Mapping[str, Any]) -> Resolved:
        """With a checkpoint's settings in place of defaults; what the user gave wins."""

        def layer(source: str) -> dict[str, Any]:
            return {name: self.values[name] for name, of in self.sources.items() if of == source}

        return resolve(layer(COMMAND_LINE), layer(CONFIG_FILE), settings)

    def changed(self, values: Mapping[str, Any], source: str) -> Resolved:
        """With other values for some settings, and where these come from."""
        return Resolved(
            {**self.values, **values}, {**self.sources, **dict.fromkeys(values, source)}
        )

    def lines(self) -> Iterable[str]:
        """``name = value (source)`` for every setting; secrets are not shown, long values in part.

        A schedule may have an entry for every update.
        """
        for name, value in self.values.items():
            shown = "auto" if (name, value) == ("micro_batch", AUTO) else repr(value)
            if SETTINGS[name].metadata["secret"] and value is not None:
                shown = "***"
            yield f"{name} = {shortened(shown, _SHOWN)} ({self.sources[name]})"

    def differing_lines(self) -> Iterable[str]:
        """Of `lines` those of settings that have another value than their default."""
        for (name, value), line in zip(self.values.items(), self.lines(), strict=True):
            if value != SETTINGS[name].default:
                yield line


def settings_from_yaml(path: str) -> dict[str, Any]:
    """The settings of a ``--config`` file; null leaves a setting to the next layer.

    Raises:
        UsageError: the file cannot be read, is not a mapping, or has an unknown key.
    """
    named = f"--config={path!r}"
    content = read_settings(in_home(path, named), named)
    check_names(content, where=f"{named}: ")
    return given(**content)


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
        UsageError: a value is out of its setting's range, two exclude each other, or there is no
            such home directory.
    """
    values: dict[str, Any] = {name: spec.default for name, spec in SETTINGS.items()}
    sources = dict.fromkeys(SETTINGS, DEFAULT)
    for source, layer in (
        (CHECKPOINT, checkpoint or {}),
        (CONFIG_FILE, config_file),
        (COMMAND_LINE, command_line),
    ):
        for name, value in layer.items():
            values[name], sources[name] = value, source
        # Each pair sets one quantity: a layer that gives one of them ends the other below it
        ended = [
            name
            for name, rival in (("grad_accum", "global_batch"), ("lr_peak", "lr"))
            if rival in layer and name not in layer
        ]
        # Under a checkpoint's schedule, a constant that the user gives would have no effect
        ended += [
            name
            for name, constant in (("alpha_schedule", "alpha"), ("temp_schedule", "T"))
            if source != CHECKPOINT and constant in layer and sources[name] == CHECKPOINT
        ]
        for name in ended:
            values[name], sources[name] = SETTINGS[name].default, DEFAULT
    moment = None if now is None else datetime.fromtimestamp(now, UTC)
    for name in ("output_gcs_uri", "local_workdir", "cache_dir"):
        if sources[name] != DEFAULT and values[name]:
            values[name] = in_home(values[name], f"--{name}={brief(values[name])}")
            if name != "cache_dir":
                values[name] = expand_dates(values[name], flag=name, now=moment)
    check_values(values)
    return Resolved(values, sources)


def for_evaluation(config: TrainConfig, *required: str) -> TrainConfig:
    """The settings that the evaluation stage goes by.

    Args:
        config: as resolved.
        required: settings that must have a value, beside the contexts.

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
    return config.require(*required)
