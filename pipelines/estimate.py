"""Estimate what a run takes: machines, tokens, time and price of each stage. Sends nothing.

    make estimate PARAMS="teacher=cached" ANNEAL_SCHEDULING=spot
    make estimate BACKEND=kfp

It takes the settings, machines and ``PARAMS`` of ``make submit-pipeline``, which prints the same
before it submits. ``PRICES`` names a file of prices in place of the package's, and ``JSON=1`` gives
JSON. No service is asked: where a data set or a teacher is neither here nor among those that are
known, the estimate says so.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import json
import os

from pipelines.estimates.plan import plan_of_run
from pipelines.estimates.stages import estimate
from pipelines.estimates.text import as_json, text
from pipelines.parameters import check_cloud_parameters, check_parameters, parse_parameters
from pipelines.settings import load_settings
from pipelines.submit import switch
from trainer.runtime.commands import run_command
from trainer.runtime.errors import UsageError
from trainer.settings.flags import OneLineParser


def main(argv: list[str]) -> None:
    """The command line: ``vertex`` or ``kfp``; the rest comes from the environment."""
    parser = OneLineParser("python -m pipelines.estimate", description=__doc__)
    parser.add_argument("backend", choices=("vertex", "kfp"), nargs="?", default="vertex")
    backend = parser.parse_args(argv).backend
    as_json_text, cache = switch("JSON"), switch("CACHE", default=True)
    settings = load_settings()
    parameters = parse_parameters(os.environ.get("PARAMS", ""))
    check_parameters(parameters, settings.processes(backend))
    if backend == "vertex":
        settings.check_vertex()
    else:
        settings.check_kubeflow()
    found = estimate(plan_of_run(settings, parameters, backend, cache=cache))
    try:
        check_cloud_parameters(parameters)
    except UsageError as error:  # what is here can be estimated, and not be submitted
        found.notes.append(f"submitting would be refused: {error}")
    print(json.dumps(as_json(found), indent=2) if as_json_text else text(found))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
