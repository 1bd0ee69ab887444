"""What is given to ``make`` on its command line: only names that the command reads.

    python -m pipelines.make_variables submit-pipeline "PROJECT PARAM"

A mistyped name would else do nothing, and a run would cost what it was to avoid. Variables of the
shell are not looked at, for others have theirs there too. This runs before anything is installed,
so it needs the standard library alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from pipelines.settings import former_names, known_names, renamed
from trainer.runtime.near_names import near_name
from trainer.settings.secret_names import shown_name

OF_MAKE = ("PYTHON", "VENV", "SHELL", "MAKEFLAGS")
"""What the Makefile itself reads, for every command."""
OF_OTHERS = (
    "CUDA_VISIBLE_DEVICES",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "HF_HOME",
    "HF_TOKEN",
    "LOG_FORMAT",
    "OMP_NUM_THREADS",
)
"""Variables of the environment that the libraries and the log read, in every command."""
_SENDING = ("PARAMS", "DRY_RUN", "JSON", "CACHE")
COMMANDS: dict[str, tuple[str, ...]] = {
    "run-local": ("PARAMS", "CACHE", "RUN"),
    "compile": ("BACKEND",),
    "build-image": ("BUILDER", "DRY_RUN"),
    "preflight": ("PARAMS",),
    "estimate": ("PARAMS", "BACKEND", "JSON", "CACHE"),
    "submit-pipeline": (*_SENDING, "WAIT", "PREFLIGHT"),
    "submit-kfp": (*_SENDING, "WAIT", "HOST", "KFP_TOKEN"),
    "schedule": (*_SENDING, "PREFLIGHT", "CRON", "HOST", "KFP_TOKEN"),
    "rerun": (*_SENDING, "WAIT", "PREFLIGHT", "RUN", "STAGE"),
    "search": (*_SENDING, "WAIT", "PREFLIGHT", "GRID", "BACKEND", "HOST", "KFP_TOKEN"),
}
"""What the pipeline's commands read beside the settings.

All of them take all settings, so that one list of them can be given to each.
"""
OTHERS: dict[str, tuple[str, ...]] = {
    "help": (),
    "setup": (),
    "bench-gpu": (),
    "lint": (),
    "test": ("JOBS",),
    "soak": (),
    "image-test": ("FULL", "SEARCH", "ENGINE", "BASE", "MIRROR", "CPU_INDEX"),
    "clean": ("ALL",),
}
"""The same of the commands that take no settings."""


def wrong_variable(goals: Iterable[str], given: Iterable[str]) -> str:
    """One line on the first variable that no command of these reads; empty if there is none.

    Args:
        goals: commands of the Makefile.
        given: names of variables.
    """
    asked, readers = list(goals) or ["help"], _readers()
    read = [name for name, commands in readers.items() if set(commands) & set(asked)]
    for name in given:
        if name in read:
            continue
        if name in readers:
            only = _listed(readers[name])
            return f"make {' '.join(asked)} does not read {name}; it is for {only}, so leave it out"
        if instead := renamed(name):
            return instead
        return f"no command reads {shown_name(name, readers)}; {_hint(name, read, readers)}"
    return ""


def _hint(name: str, read: Iterable[str], readers: Iterable[str]) -> str:
    """What a name that no command reads may stand for, those that are read before others."""
    if near := near_name(name, read) or near_name(name, readers):
        return f"did you mean {near}?"
    if former := near_name(name, former_names()):
        return renamed(former)
    return (
        "docs/pipeline.md lists what they read; what is for another program stands before the"
        " command, NAME=value make"
    )


def _readers() -> dict[str, list[str]]:
    """By name of a variable: the commands that read it."""
    every = [*COMMANDS, *OTHERS]
    readers = dict.fromkeys((*OF_MAKE, *OF_OTHERS), every)
    readers |= {name: [*COMMANDS] for name in ("SETTINGS", *known_names())}
    for command, names in (COMMANDS | OTHERS).items():
        for name in names:
            readers.setdefault(name, []).append(command)
    return readers


def _listed(commands: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(commands[:-1]), commands[-1])))


if __name__ == "__main__":
    wrong = wrong_variable(sys.argv[1].split(), sys.argv[2].split())
    if wrong:
        print(wrong)
    raise SystemExit(2 if wrong else 0)
