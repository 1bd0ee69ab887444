"""Write docs/pipeline.md: the pipeline's picture, parameters and settings, from what is compiled.

python -m pipelines.describe > docs/pipeline.md
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pipelines.anneal import build_pipeline
from pipelines.parameters import parameter_defaults, parameter_help
from pipelines.settings import Settings
from pipelines.stages import DEFAULT_MACHINES, Machine, compiled, titles_of
from trainer.runtime.commands import run_command
from trainer.settings.flags import OneLineParser

_HEAD = """# The pipeline

Written by `python -m pipelines.describe` from the compiled pipeline and the settings.

"""
_PARAMETERS = """## Parameters

Given as `PARAMS="name=value name=value"`, or edited in the UI; named by stage, or for all of them.
An empty text leaves a setting to its default. JSON stands in single quotes:
`PARAMS="anneal_more_settings='{\\"d_model\\": 512, \\"n_heads\\": 8}'"`, with any settings of
`python -m trainer.entrypoint --help`. The commands check values as the stage will, before anything
is sent.

"""
_SETTINGS = """## Settings

From the environment (`make NAME=value`), else from `pipeline.yaml` (or the file that `SETTINGS`
names), else the default. These belong to one command and are read from the environment alone:
`PARAMS`; `WAIT=1` (follow the run to its end); `DRY_RUN=1` (print the request, send nothing);
`CACHE=0` (run every task, or with `make rerun` every repeated one, even if the cache has it);
`HOST` and `KFP_TOKEN` (address and token of open-source Kubeflow Pipelines); `RUN` and `STAGE`.

"""
_MACHINES = """## Machines

One set a stage: `{STAGE}_{NAME}` with STAGE one of %s.

On Vertex AI the GPU stages are custom training jobs, whose CPU cores and memory are those of the
machine type; the other stages are plain tasks, which take CPU, memory and retries. On open-source
Kubeflow Pipelines all are plain tasks, and GPUs are asked for as `nvidia.com/gpu`, whatever their
type; a type with a `/`, such as `amd.com/gpu`, is taken as the resource's name. Keep artifacts on
Cloud Storage there too: a training that is retried goes on from the snapshots at its output, and on
another store they are not there before the task has ended.

"""
_CACHE = """
## What the cache goes by

A task is taken from the cache when its image, its parameters and its input artifacts are those of
an earlier task. Nothing of the submission is among them: no time, no name of the run. Mind that

- for a custom training job the machine, service account, network, key and labels are parameters
  too: changing one of them for a GPU stage reruns it;
- a data set is known by its name, configuration and revision, not by its content: where the files
  under one name have changed, give another `dataset_revision`, or `CACHE=0`;
- an image is known by the name given: name it by digest, `…@sha256:…` (`make run-local` goes by the
  stages' code);
- `make rerun` takes the image, machines, service account, network and key of the run that it
  repeats.
"""


def edges(spec: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of titles: a task, and one that depends on it."""
    titles = titles_of(spec)
    return sorted(
        (titles[before], titles[key])
        for key, task in spec["root"]["dag"]["tasks"].items()
        for before in task.get("dependentTasks", ())
    )


def description() -> str:
    """The whole document."""
    pipeline = compiled(build_pipeline(Settings(), "local"))
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {before} --> {after}" for before, after in edges(pipeline)]
    lines += ["```", "", _PARAMETERS.strip(), "", "| parameter | what it is | default |"]
    lines += ["|---|---|---|"]
    for name, value in parameter_defaults().items():
        described = parameter_help(name).replace("|", "\\|")
        lines.append(f"| `{name}` | {described} | `{value!r}` |")
    lines += ["", _SETTINGS.strip(), "", "| setting | what it is | default |", "|---|---|---|"]
    for spec_field in fields(Settings):
        if spec_field.metadata:
            shown = _cell(getattr(Settings(), spec_field.name))
            lines.append(
                f"| `{spec_field.name.upper()}` | {spec_field.metadata['help']} | {shown} |"
            )
    lines += ["", (_MACHINES % ", ".join(DEFAULT_MACHINES).upper()).strip(), ""]
    lines += ["| name | what it is | ANNEAL | PREPARE |", "|---|---|---|---|"]
    for spec_field in fields(Machine):
        values = [getattr(DEFAULT_MACHINES[key], spec_field.name) for key in ("anneal", "prepare")]
        cells = " | ".join(_cell(value) for value in values)
        lines.append(f"| `{spec_field.name.upper()}` | {spec_field.metadata['help']} | {cells} |")
    return _HEAD + "\n".join(lines) + "\n" + _CACHE


def _cell(value: object) -> str:
    return "–" if value in ("", {}, None) else f"`{value}`"


def main(argv: list[str]) -> None:
    """The command line."""
    OneLineParser("python -m pipelines.describe", description=__doc__).parse_args(argv)
    print(description(), end="")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
