"""Write docs/pipeline.md: the pipeline's picture, parameters and settings, from what is compiled.

python -m pipelines.describe > docs/pipeline.md
"""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from pipelines.compile import compile_to
from pipelines.parameters import parameter_defaults
from pipelines.settings import STAGES, Machine, Settings
from trainer.config import run_command

_HEAD = """# The pipeline

Written by `python -m pipelines.describe` from the compiled pipeline and the settings.

"""
_PARAMETERS = """## Parameters

Given as `PARAMS="name=value name=value"`, or edited in the UI; named by stage. `…_more_settings` is
a JSON object of any further settings of the trainer (`python -m trainer.entrypoint --help`). An
empty text or a `grad_accum` of 0 leaves a setting to its default.

"""
_SETTINGS = """## Settings

From the environment (`make NAME=value`), else from `pipeline.yaml` (or the file that `SETTINGS`
names), else the default.

"""
_MACHINES = """## Machines

One set a stage: `{STAGE}_{NAME}` with STAGE one of %s. On Vertex AI the GPU stages are custom
training jobs, which take all of these; plain tasks take CPU, memory, accelerators and retries.

"""


def edges(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of display names: a task, and one that depends on it."""
    tasks = spec["root"]["dag"]["tasks"]
    names = {key: task["taskInfo"]["name"] for key, task in tasks.items()}
    return sorted(
        (names[before], names[key])
        for key, task in tasks.items()
        for before in task.get("dependentTasks", ())
    )


def description() -> str:
    """The whole document."""
    with tempfile.TemporaryDirectory() as scratch:
        path = compile_to(Path(scratch) / "pipeline.yaml", Settings(), "local")
        spec = next(iter(yaml.safe_load_all(path.read_text())))
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {before} --> {after}" for before, after in edges(spec)]
    lines += ["```", "", _PARAMETERS.strip(), "", "| parameter | default |", "|---|---|"]
    lines += [f"| `{name}` | `{value!r}` |" for name, value in parameter_defaults().items()]
    lines += ["", _SETTINGS.strip(), "", "| setting | what it is | default |", "|---|---|---|"]
    for spec_field in fields(Settings):
        if spec_field.metadata:
            default = getattr(Settings(), spec_field.name)
            shown = f"`{default}`" if default else "–"
            lines.append(
                f"| `{spec_field.name.upper()}` | {spec_field.metadata['help']} | {shown} |"
            )
    lines += ["", (_MACHINES % ", ".join(stage.upper() for stage in STAGES)).strip(), ""]
    lines += ["| name | what it is | ANNEAL | PREPARE |", "|---|---|---|---|"]
    machines = Settings().machines
    for spec_field in fields(Machine):
        values = [getattr(machines[stage], spec_field.name) for stage in ("anneal", "prepare")]
        cells = " | ".join(f"`{value}`" for value in values)
        lines.append(f"| `{spec_field.name.upper()}` | {spec_field.metadata['help']} | {cells} |")
    return _HEAD + "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """The command line."""
    print(description(), end="")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
