"""The pipeline's parameters as users give them: ``PARAMS="continue_train_steps=8000 seed=7"``."""

from __future__ import annotations

import difflib
import inspect
import json
import shlex
from typing import Any

from pipelines.anneal import build_pipeline
from pipelines.settings import Settings
from trainer.errors import UsageError


def parameter_defaults() -> dict[str, Any]:
    """Every parameter, named by stage, with its default."""
    function = build_pipeline(Settings(), "local").pipeline_func
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }


def parse_parameters(text: str) -> dict[str, Any]:
    """``name=value`` pairs separated by spaces; values with spaces in quotes, dicts as JSON.

    Raises:
        UsageError: an unknown parameter, with the nearest known one, or a value of another type.
    """
    defaults = parameter_defaults()
    try:
        pieces = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"PARAMS={text!r}: {error}") from None
    parsed: dict[str, Any] = {}
    for piece in pieces:
        name, sign, value = piece.partition("=")
        if not sign:
            raise UsageError(f"PARAMS: {piece!r} is not name=value")
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"PARAMS: unknown parameter {name!r}{hint}")
        parsed[name] = _converted(name, value, type(defaults[name]))
    return parsed


def _converted(name: str, value: str, kind: type) -> Any:
    try:
        if kind is dict:
            converted = json.loads(value)
            if not isinstance(converted, dict):
                raise ValueError
            return converted
        return kind(value)
    except ValueError:
        wanted = {int: "a whole number", float: "a number", dict: "a JSON object"}[kind]
        raise UsageError(f"PARAMS: {name}={value!r}: {wanted} is needed") from None
