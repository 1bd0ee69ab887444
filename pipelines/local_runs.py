"""The directories of local runs: ``work/runs/NAME``, each with the parameters that made it."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.runtime.errors import UsageError
from trainer.runtime.messages import brief

RUNS = "runs"
PARAMETERS = "parameters.json"
LOG = "pipeline.log"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,99}")
_FOREIGN = re.compile(r"[^A-Za-z0-9._=-]+")
_LONGEST = 76
"""Characters of a name; what does not fit is in the file of parameters."""


def name_of_run(given: Mapping[str, Any]) -> str:
    """A name for a run that starts now: when, and with which parameters of the user's."""
    shown = time.strftime("%Y%m%d-%H%M%S")
    for name, value in given.items():
        longer = f"{shown}-{_FOREIGN.sub('_', f'{name}={value}')}"
        if len(longer) > _LONGEST:
            return f"{shown}-more"
        shown = longer
    return shown


def open_run(
    work: Path, parameters: Mapping[str, Any], code: str, *, name: str = "", given: str = ""
) -> Path:
    """The directory of a run, with its parameters in it; one of that name may go on.

    Args:
        work: of all local runs.
        parameters: of the pipeline, those that are not its defaults.
        code: a digest of what the stages run.
        name: of the run; by default its time, and a number where that is taken.
        given: the name that the user has typed, which says that a run of that name is meant.

    Raises:
        UsageError: a name that is no directory's, or that another run has.
    """
    name = given or name or name_of_run({})
    if not _NAME.fullmatch(name):
        raise UsageError(f"RUN={brief(name)}: give letters, digits and . _ = + -, 100 at most")
    described: dict[str, Any] = {"parameters": dict(parameters), "code": code}
    directory = work / RUNS / name
    if given and directory.exists():
        _check_same(directory, parameters)
    else:
        directory = _new(directory)
    described["started"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    text = json.dumps(described, indent=2, ensure_ascii=False, default=str)
    (directory / PARAMETERS).write_text(text + "\n", encoding="utf-8")
    return directory


def _new(directory: Path) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = directory if number == 1 else directory.with_name(f"{directory.name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
        number += 1


def _check_same(directory: Path, parameters: Mapping[str, Any]) -> None:
    try:
        before = json.loads((directory / PARAMETERS).read_text(encoding="utf-8"))["parameters"]
        names = [*before, *parameters]
    except (OSError, ValueError, LookupError, TypeError):
        raise UsageError(
            f"RUN={directory.name}: {directory} holds no run; give another name, or remove it"
        ) from None
    differing = [name for name in dict.fromkeys(names) if before.get(name) != parameters.get(name)]
    if differing:
        raise UsageError(
            f"RUN={directory.name} is another run, with other {', '.join(differing)}; give another"
            f" name, or see {directory / PARAMETERS}"
        )
