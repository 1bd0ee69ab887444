"""Look whether Vertex AI would run the pipeline, before anything is sent.

    make preflight PROJECT=… PIPELINE_ROOT=gs://… TRAINER_IMAGE=… PARAMS="…"

It takes what ``make submit-pipeline`` takes, which looks the same way before it sends
(``PREFLIGHT=0``: it does not). Every check reads only. What failed ends with the command that mends
it; what could not be checked says why. Services are found where gcloud would find them, see
`pipelines.checks.google_cloud`.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from google.auth import exceptions as auth

from pipelines import vertex
from pipelines.checks.capacity import Capacity, alternative_name, choose, gpu_stages
from pipelines.checks.findings import Finding, run_checks
from pipelines.checks.google_cloud import Account, caller
from pipelines.checks.hub import hub_checks
from pipelines.checks.places import Places
from pipelines.checks.rights import StageAccount
from pipelines.parameters import parameter_defaults, parameters_to_send
from pipelines.settings import Settings, load_settings
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError
from trainer.runtime.log import set_up_logging
from trainer.settings.flags import OneLineParser

_MARKS = {"fine": "ok", "failed": "FAILED", "unchecked": "?"}
NEEDED = ("project", "region", "pipeline_root", "trainer_image")
"""Settings without which nothing can be sent to Vertex AI."""


def preflight(
    settings: Settings,
    parameters: Mapping[str, Any],
    stages: Iterable[str] | None = None,
    tasks: Mapping[str, int] = MappingProxyType({}),
) -> tuple[Settings, list[Finding]]:
    """Look at everything that a run of the pipeline needs.

    Args:
        settings: where it would run.
        parameters: those given.
        stages: whose machines are looked at; None: of all that the parameters let run.
        tasks: how many there are of a stage at a time, where these are several.

    Returns:
        The settings, with the machines that can be had, and what was found.

    Raises:
        UsageError: a region that Vertex AI does not have.
    """
    values = parameter_defaults() | dict(parameters)
    end = time.monotonic() + settings.preflight_seconds
    vertex.connect(settings)
    accounts: list[Account] = []
    first = {"credentials": partial(_credentials, settings.project, accounts)}
    (credentials,) = run_checks(first, settings.preflight_seconds, settings.project)
    if credentials.verdict != "fine":
        return settings, [credentials]
    account = accounts[0]
    looked_at = gpu_stages(settings, values) if stages is None else list(stages)
    machines = Capacity(settings, values, account, tasks).checks(looked_at)
    stage_account = StageAccount(account, settings.service_account, settings.project)
    checks = Places(settings, values, account, stage_account).checks() | hub_checks(values)
    found = run_checks(checks | machines, max(0.0, end - time.monotonic()), settings.project)
    chosen, said = choose(settings, looked_at, found)
    kept = [finding for finding in found if finding.check not in machines]
    taken = replace(settings, machines={**settings.machines, **chosen})
    return taken, [credentials, *kept, *said]


def before_sending(
    settings: Settings,
    parameters: Mapping[str, Any],
    stages: Iterable[str] | None = None,
    tasks: Mapping[str, int] = MappingProxyType({}),
) -> Settings:
    """`preflight`, of which only what is not fine is printed, and which machines were chosen.

    Raises:
        LiquidError: a check failed.
    """
    taken, findings = preflight(settings, parameters, stages, tasks)
    listing = [stage for stage, machine in settings.machines.items() if machine.machines]
    chosen = {alternative_name(stage, taken.machines[stage]) for stage in listing}
    for finding in findings:
        if finding.check in chosen and finding.verdict == "fine":
            print(finding.line)
    shown = report(findings, all_of_them=False)
    print(f"{shown}\n{ending(findings)}" if shown else ending(findings), flush=True)
    if any(finding.verdict == "failed" for finding in findings):
        raise LiquidError(f"nothing was sent: {ending(findings)}; PREFLIGHT=0 sends all the same")
    return taken


def _credentials(project: str, accounts: list[Account]) -> Finding:
    """Find the account that asks, and add it."""
    name, login = "credentials", "gcloud auth application-default login"
    try:
        account = caller(project)
    except auth.TransportError:
        raise
    except auth.GoogleAuthError as error:
        return Finding(name, "failed", vertex.first_line(error), login)
    accounts.append(account)
    return Finding(name, "fine", account.email or "those of your user account")


def report(findings: Iterable[Finding], *, all_of_them: bool) -> str:
    """The findings: a table on a terminal, else a line each.

    Args:
        findings: what was found.
        all_of_them: False leaves out what is fine.
    """
    shown = [one for one in findings if all_of_them or one.verdict != "fine"]
    if not sys.stdout.isatty():
        return "\n".join(f"{_MARKS[one.verdict]} {one.line}" for one in shown)
    width = max((len(one.check) for one in shown), default=0)
    rows = []
    for one in shown:
        rows.append(f"{_MARKS[one.verdict]:<6}  {one.check:<{width}}  {one.said}")
        rows += [f"{'':<6}  {'':<{width}}  $ {one.mend}"] if one.mend else []
    return "\n".join(rows)


def ending(findings: list[Finding]) -> str:
    """How many checks are fine, failed, and could not be made."""
    counts = Counter(finding.verdict for finding in findings)
    said = f"{counts['fine']} of {len(findings)} checks are fine"
    if counts["unchecked"]:
        said += f", {counts['unchecked']} could not be made"
    return said + (f", {counts['failed']} failed" if counts["failed"] else "")


def main(argv: list[str]) -> None:
    """The command line; everything comes from the environment and the settings file.

    Raises:
        LiquidError: a check failed.
    """
    set_up_logging()
    OneLineParser("python -m pipelines.preflight", description=__doc__).parse_args(argv)
    settings = load_settings()
    parameters = parameters_to_send(settings, "vertex")
    settings.require(*NEEDED).check_vertex()
    _, findings = preflight(settings, parameters)
    print(report(findings, all_of_them=True), flush=True)
    if any(finding.verdict == "failed" for finding in findings):
        raise LiquidError(ending(findings))
    print(ending(findings))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
