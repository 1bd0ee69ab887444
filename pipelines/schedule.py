"""Let Vertex AI submit the pipeline again and again, by its own schedules.

    make schedule CRON="0 3 * * 1" PROJECT=… PIPELINE_ROOT=gs://… TRAINER_IMAGE=… PARAMS="…"

It takes what ``make submit-pipeline`` takes, and looks first as that does. ``CRON`` is minute,
hour, day of the month, month and day of the week, in UTC or behind ``TZ=Europe/Berlin``. Of the
runs of a schedule one is under way at a time. What each of them will take is printed first.
``DRY_RUN=1`` sends nothing and with ``JSON=1`` prints the request.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import os
import re
from typing import Any

from pipelines.anneal import NAME
from pipelines.estimates.plan import plan_of_run
from pipelines.estimates.stages import estimate
from pipelines.estimates.text import text
from pipelines.parameters import parameter_defaults, parameters_to_send
from pipelines.pins import with_revisions
from pipelines.settings import Settings, load_settings
from pipelines.submit import Switches, new_run_id, ready_for_vertex, vertex_job
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError, UsageError
from trainer.runtime.log import set_up_logging
from trainer.settings.flags import OneLineParser

_CRON = re.compile(r"(?:(?:CRON_)?TZ=[\w/+-]+ +)?[\d*/,A-Za-z-]+(?: +[\d*/,A-Za-z-]+){4}")


def check_cron(cron: str) -> str:
    """The times, if they are written as cron writes them.

    Raises:
        UsageError: they are not.
    """
    if not _CRON.fullmatch(cron.strip()):
        raise UsageError(
            f"CRON={cron!r}: five fields are needed, minute, hour, day of the month, month and day"
            ' of the week, such as "0 3 * * 1", with TZ=Europe/Berlin in front where it is not UTC'
        )
    return cron.strip()


def schedule(settings: Settings, parameters: dict[str, Any], cron: str) -> None:
    """Create a schedule and print its name and page.

    Raises:
        UsageError: something is missing or makes no sense.
        LiquidError: a check failed, or it could not be created.
    """
    switches = Switches()
    times = check_cron(cron)
    settings = ready_for_vertex(settings, parameters, switches)
    from google.cloud import aiplatform
    from google.cloud.aiplatform_v1 import Schedule

    from pipelines import vertex

    with vertex.readable_errors(settings):
        job = vertex_job(settings, parameters, switches, new_run_id())
        made = aiplatform.PipelineJobSchedule(pipeline_job=job, display_name=NAME)
        plan = plan_of_run(settings, parameters, "vertex", cache=switches.cache)
        switches.show(text(estimate(plan)))
        if switches.request_alone:
            print(Schedule.to_json(made._gca_resource))
        if switches.dry_run:
            return
        made.create(
            cron=times,
            max_concurrent_run_count=1,
            service_account=settings.service_account or None,
            network=settings.network or None,
            create_request_timeout=vertex.REQUEST_SECONDS,
        )
    name = made.gca_resource.name
    if not name:
        place = settings.api_endpoint or settings.region
        raise LiquidError(f"{place} answered without naming a schedule; check API_ENDPOINT")
    print(f"scheduled {name}\n{vertex.schedules_link(settings)}")


def main(argv: list[str]) -> None:
    """The command line; everything comes from the environment and the settings file."""
    set_up_logging()
    OneLineParser("python -m pipelines.schedule", description=__doc__).parse_args(argv)
    settings = load_settings()
    parameters = parameters_to_send(settings, "vertex")
    parameters = with_revisions(parameters, parameter_defaults())
    schedule(settings, parameters, os.environ.get("CRON", ""))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
