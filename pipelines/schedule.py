"""Let the platform submit the pipeline again and again, by its own schedules.

    make schedule CRON="0 3 * * 1" PROJECT=… PIPELINE_ROOT=gs://… TRAINER_IMAGE=… PARAMS="…"
    make schedule CRON="0 3 * * 1" HOST=http://… TRAINER_IMAGE=… PARAMS="…"

It takes what ``make submit-pipeline`` takes, and looks first as that does; with ``HOST`` what
``make submit-kfp`` takes. ``CRON`` is minute, hour, day of the month, month and day of the week. On
Vertex AI these are in UTC, or behind ``TZ=Europe/Berlin``; Kubeflow Pipelines goes by the time zone
of its server, and has a field for seconds in front, which is put there. Of the runs of a schedule
one is under way at a time. What each of them will take is printed first. ``DRY_RUN=1`` sends
nothing and with ``JSON=1`` prints the request.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import os
import re
from typing import Any

from pipelines.anneal import NAME, build_pipeline
from pipelines.parameters import parameter_defaults, parameters_to_send
from pipelines.pins import check_places
from pipelines.settings import Settings, load_settings
from pipelines.submit import (
    Switches,
    estimate_of,
    kfp_options,
    new_run_id,
    ready_for_vertex,
    require_kfp,
    send_to_kfp,
    vertex_job,
)
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError, UsageError
from trainer.runtime.log import set_up_logging
from trainer.settings.flags import OneLineParser

_ZONE = re.compile(r"(?:CRON_)?TZ=[\w/+-]+ +")
_FIELDS = re.compile(r"[\d*/,A-Za-z-]+(?: +[\d*/,A-Za-z-]+){4}")
_SUNDAY = "7"


def check_cron(cron: str) -> str:
    """The times, if they are written as cron writes them.

    Raises:
        UsageError: they are not.
    """
    times = cron.strip()
    if not _FIELDS.fullmatch(_ZONE.sub("", times, count=1)):
        raise UsageError(
            f"CRON={cron!r}: five fields are needed, minute, hour, day of the month, month and day"
            ' of the week, such as "0 3 * * 1", with TZ=Europe/Berlin in front where it is not UTC'
        )
    return times


def with_seconds(cron: str) -> str:
    """Times as Kubeflow Pipelines writes them: with a field for seconds, and Sunday as 0.

    Args:
        cron: as `check_cron` returns it.

    Raises:
        UsageError: they name a time zone.
    """
    if zone := _ZONE.match(cron):
        raise UsageError(
            f"CRON={cron!r}: Kubeflow Pipelines goes by the time zone of its server, which its"
            f" variable CRON_SCHEDULE_TIMEZONE names (UTC by default); leave {zone[0].strip()} out"
        )
    *fields, weekdays = cron.split()
    days = ["0" if day == _SUNDAY else day for day in weekdays.split(",")]
    return " ".join(["0", *fields, ",".join(days)])


def schedule(settings: Settings, parameters: dict[str, Any], cron: str) -> None:
    """Create a schedule of Vertex AI and print its name and page.

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
        made = aiplatform.PipelineJobSchedule(
            pipeline_job=job,
            display_name=NAME,
            credentials=job.credentials,  # a dry run has none, and needs none
        )
        switches.show(estimate_of(settings, parameters, "vertex", switches)())
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


def schedule_kfp(settings: Settings, parameters: dict[str, Any], cron: str, host: str) -> None:
    """Create a recurring run of Kubeflow Pipelines at ``host`` and print its times and page.

    Raises:
        UsageError: something is missing or makes no sense.
        LiquidError: it could not be created.
    """
    switches = Switches()
    times = with_seconds(check_cron(cron))
    require_kfp(settings, host)
    experiment = settings.experiment or NAME
    request: dict[str, Any] = {
        "job_name": NAME,
        "cron_expression": times,
        "max_concurrency": 1,
        "no_catchup": True,  # as on Vertex AI: what was missed is not made up for
        "params": parameters,
        **kfp_options(settings, switches),
    }

    def create(client: Any, path: str, namespace: str | None) -> Any:
        listed_in = client.create_experiment(experiment, namespace=namespace).experiment_id
        return client.create_recurring_run(listed_in, pipeline_package_path=path, **request)

    shown = request | {"experiment_name": experiment, "namespace": settings.namespace or None}
    expected = estimate_of(settings, parameters, "kfp", switches)
    sent = send_to_kfp(settings, host, switches, shown, create, build_pipeline, expected)
    if sent is None:
        return
    _, made = sent
    if not made.recurring_run_id:
        raise LiquidError(f"{host} answered without naming a schedule; check HOST and KFP_TOKEN")
    page = f"{host.rstrip('/')}/#/recurringrun/details/{made.recurring_run_id}"
    print(f"scheduled at {times} (seconds, minute, hour, …; the server's time zone)\n{page}")


def main(argv: list[str]) -> None:
    """The command line; everything comes from the environment and the settings file."""
    set_up_logging()
    OneLineParser("python -m pipelines.schedule", description=__doc__).parse_args(argv)
    settings = load_settings()
    host, cron = os.environ.get("HOST", ""), os.environ.get("CRON", "")
    parameters = parameters_to_send(settings, "kfp" if host else "vertex")
    check_places(parameters, parameter_defaults())
    if host:
        schedule_kfp(settings, parameters, cron, host)
    else:
        schedule(settings, parameters, cron)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
