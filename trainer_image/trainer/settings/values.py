"""Settings from and to text."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterable
from typing import Any

from trainer.runtime.errors import UsageError
from trainer.runtime.messages import brief
from trainer.runtime.near_names import near_name
from trainer.settings.config import (
    AUTO,
    LM_EVAL_SETTINGS,
    SAMPLE_SETTINGS,
    SETTINGS,
    TARGET_SETTINGS,
    LmEvalSettings,
    SampleSettings,
    TargetSettings,
    TrainConfig,
)
from trainer.settings.secret_names import shown_name
from trainer.settings.text_yaml import LONGEST

_MOST_BITS = 1024
"""Of a whole number, which Python does not write out where it is very long."""

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word not in (*_TRUE, *_FALSE):
        raise ValueError("true or false is needed")
    return word in _TRUE


SPECS = SETTINGS | TARGET_SETTINGS | SAMPLE_SETTINGS | LM_EVAL_SETTINGS
"""Every setting of every command."""

TYPES = {
    name: hint
    for settings in (TrainConfig, TargetSettings, SampleSettings, LmEvalSettings)
    for name, hint in typing.get_type_hints(settings).items()
}


def _check_text(name: str, text: str, *, secret: bool) -> None:
    """Refuse what no path, name or number is: very long, or not to be told to the system."""
    if len(text) > LONGEST and not name.endswith("_schedule"):
        raise UsageError(f"--{name} has {len(text)} characters; at most {LONGEST} are expected")
    try:
        os.fsencode(text)
        usable = "\0" not in text
    except UnicodeEncodeError:
        usable = False
    if not usable:
        shown = "***" if secret else brief(text)
        raise UsageError(f"--{name}={shown} holds a NUL or half a character; leave it out")


def parse_value(name: str, value: Any) -> Any:
    """A setting's value from text (command line) or from a YAML scalar or list.

    Raises:
        UsageError: the value is not of the setting's type or not one of its choices.
    """
    spec, kind = SPECS[name], TYPES[name]
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    if typing.get_origin(kind) is not tuple and options:
        kind = options[0]
    secret = spec.metadata["secret"]
    if isinstance(value, dict) or (isinstance(value, list) and not spec.metadata["parse"]):
        shown = "***" if secret else brief(value)
        raise UsageError(f"--{name}={shown}: one value is needed, not a {type(value).__name__}")
    if value == "" and type(None) in typing.get_args(TYPES[name]):
        return None
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise UsageError(f"--{name}: a number of {value.bit_length()} bits is out of range")
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON and YAML know one kind of number
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    _check_text(name, text, secret=secret)
    parse = spec.metadata["parse"] or (_boolean if kind is bool else kind)
    try:
        parsed = parse(text)
    except ValueError as error:
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, error)
        shown = "***" if secret else brief(text)
        raise UsageError(f"--{name}={shown}: {wanted} is needed") from None
    choices = spec.metadata["choices"]
    if choices and parsed not in choices:
        near = near_name(text, choices)
        hint = f"; did you mean {near}?" if near else ""
        raise UsageError(f"--{name}={brief(text)}: choose one of {', '.join(choices)}{hint}")
    return parsed


def as_text(name: str, value: Any) -> str:
    """A setting's value as `parse_value` reads it."""
    if (name, value) == ("micro_batch", AUTO):
        return "auto"
    if value is None:
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def given(**values: Any) -> dict[str, Any]:
    """Those settings that have a value, parsed; empty text and None leave one to its default.

    Raises:
        UsageError: there is no such setting, or a value is not one that its setting can take.
    """
    check_names(values)
    return {
        name: parse_value(name, value)
        for name, value in values.items()
        if value is not None and value != ""
    }


def check_names(names: Iterable[Any], where: str = "") -> None:
    """Refuse names that are no settings.

    Raises:
        UsageError: naming the first one, with the nearest setting; ``where`` stands before it.
    """
    for name in names:
        if name == "config":
            raise UsageError(f"{where}'config' names a file, which the command line alone gives")
        if name not in SETTINGS:
            near = near_name(str(name), SETTINGS)
            hint = f"; did you mean {near!r}?" if near else ""
            shown = brief(shown_name(str(name), SETTINGS))
            raise UsageError(f"{where}unknown setting {shown}{hint}")
