"""Bring the picture and the tables of docs/pipeline.md up to date; the text around them is kept.

python -m pipelines.describe
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipelines.anneal import build_pipeline
from pipelines.estimates.plan import plan_of_run
from pipelines.estimates.stages import estimate
from pipelines.estimates.text import DEFAULTS, text
from pipelines.parameters import parameter_defaults, parameter_help, parse_parameters
from pipelines.settings import Settings, load_settings
from pipelines.spec import compiled, tasks_of
from pipelines.stages import DEFAULT_MACHINES
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError
from trainer.settings.flags import OneLineParser

DOCUMENT = Path(__file__).parent.parent / "docs" / "pipeline.md"


EXAMPLE = {
    "PARAMS": "teacher=cached target_workers=2",
    "TARGETS_SCHEDULING": "spot",
    "ANNEAL_MACHINE_TYPE": "a3-highgpu-1g",
    "ANNEAL_ACCELERATOR_TYPE": "NVIDIA_H100_80GB",
}
"""Variables of the estimate that the document shows."""


def example() -> list[str]:
    """The command with these variables and what it prints, but for the long end of it."""
    settings = load_settings(EXAMPLE)
    parameters = parse_parameters(EXAMPLE["PARAMS"])
    printed = text(estimate(plan_of_run(settings, parameters, "vertex", cache=True)))
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in EXAMPLE.items())
    shown = printed.partition(DEFAULTS)[0].splitlines()
    return ["```", f"$ make estimate {given}", *shown, f"{DEFAULTS}", "  …", "```"]


def parts() -> dict[str, list[str]]:
    """The lines of the picture and of each table, by the name that the document gives them."""
    pipeline = compiled(build_pipeline(Settings(), "local"))
    tasks = tasks_of(pipeline)
    arrows = sorted(
        f"    {tasks[before].title} --> {task.title}"
        for task in tasks.values()
        for before in task.after
    )
    parameters = [
        (f"`{name}`", parameter_help(name).replace("|", "\\|"), f"`{value!r}`")
        for name, value in parameter_defaults().items()
    ]
    names = [name.upper() for name in DEFAULT_MACHINES]
    return {
        "picture": ["```mermaid", "flowchart TD", *arrows, "```"],
        "parameters": _table(("parameter", "what it is", "default"), parameters),
        "estimate": example(),
        "settings": _table(("setting", "what it is", "default"), _rows(Settings())),
        "machines": [
            f"One set a stage: `{{STAGE}}_{{NAME}}` with STAGE one of {', '.join(names)}.",
            "",
            *_table(("name", "what it is", *names), _rows(*DEFAULT_MACHINES.values())),
        ],
    }


def _table(names: tuple[str, ...], rows: list[Any]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (names, ("---",) * len(names), *rows)]


def _rows(*examples: Any) -> list[tuple[str, ...]]:
    """Name and description of each setting, and what the examples hold."""
    return [
        (
            f"`{spec.name.upper()}`",
            spec.metadata["help"],
            *(_cell(getattr(example, spec.name)) for example in examples),
        )
        for spec in fields(examples[0])
        if spec.metadata
    ]


def _cell(value: object) -> str:
    return "–" if value in ("", {}, None) else f"`{value}`"


def up_to_date(document: str) -> str:
    """The document's text with picture and tables as they are now.

    Raises:
        LiquidError: the text has no place for one of them.
    """
    for name, lines in parts().items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = document.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise LiquidError(f"{DOCUMENT} has no place for {name}, between {start!r} and {end!r}")
        document = "\n".join([before + start, *lines, "", end + after])
    return document


def main(argv: list[str]) -> None:
    """The command line."""
    OneLineParser("python -m pipelines.describe", description=__doc__).parse_args(argv)
    DOCUMENT.write_text(up_to_date(DOCUMENT.read_text()))
    print(DOCUMENT)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
