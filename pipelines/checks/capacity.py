"""Which machine a stage can have: what the region offers, and what the quota has room for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

from google.api_core import exceptions as api

from pipelines.checks.findings import Check, Finding, GarbageError, unchecked
from pipelines.checks.google_cloud import Account
from pipelines.settings import Settings
from pipelines.stages import STAGES, Machine

_MEMORY = re.compile(r"_\d+gb$")
_VERTEX = "aiplatform.googleapis.com"
_SIZED_BY_NAME = "NVIDIA_A100_80GB"
"""The one accelerator whose quota names its memory, since there are two of that kind."""


def quota_metric(machine: Machine) -> str:
    """The quota that a machine's accelerators count against.

    Spot machines and those of flex start count against the preemptible one.
    """
    kind = machine.accelerator_type.removeprefix("NVIDIA_").removeprefix("TESLA_").lower()
    if machine.accelerator_type != _SIZED_BY_NAME:
        kind = _MEMORY.sub("", kind)
    way = "" if machine.scheduling == "standard" else "preemptible_"
    return f"{_VERTEX}/custom_model_training_{way}nvidia_{kind}_gpus"


def gpus_asked(stage: str, machine: Machine, parameters: Mapping[str, Any]) -> int:
    """How many accelerators a stage has at a time, over all machines and workers."""
    workers = int(parameters["target_workers"]) if STAGES[stage].fans_out else 1
    return machine.accelerator_count * machine.replicas * workers


def gpu_stages(settings: Settings, parameters: Mapping[str, Any]) -> list[str]:
    """The stages of a run that are custom jobs."""
    return [
        stage
        for stage, machine in settings.machines.items()
        if machine.gpu and STAGES[stage].only_if_teacher in ("", parameters["teacher"])
    ]


@dataclass(frozen=True)
class Capacity:
    """The checks of the machines of a run's stages."""

    settings: Settings
    parameters: Mapping[str, Any]
    caller: Account
    tasks: Mapping[str, int] = field(default_factory=dict)
    """How many tasks of a stage there are at a time, where a search has several."""

    def checks(self, stages: Iterable[str]) -> dict[str, Check]:
        """By name: for each alternative of each stage, whether it can be had."""
        return {
            name: partial(self._look, name, machine, gpus)
            for stage in stages
            for name, machine, gpus in self._alternatives(stage)
        }

    def _alternatives(self, stage: str) -> list[tuple[str, Machine, int]]:
        tasks, machine = self.tasks.get(stage, 1), self.settings.machines[stage]
        return [
            (alternative_name(stage, one), one, tasks * gpus_asked(stage, one, self.parameters))
            for one in machine.alternatives
        ]

    def _look(self, name: str, machine: Machine, gpus: int) -> Finding:
        offered = self._region_offers(name, machine)
        if offered.verdict == "failed":
            return offered
        try:
            quota = self._quota(name, machine, gpus)
        except Exception as error:  # noqa: BLE001 - the region's answer is to be said all the same
            quota = unchecked(name, error, self.settings.project)
        if quota.verdict != "fine" or offered.verdict == "fine":
            return quota
        return Finding(name, "unchecked", f"{quota.said}; {offered.said}", offered.mend)

    def _region_offers(self, name: str, machine: Machine) -> Finding:
        """Whether a zone of the region has the machine type and its accelerator."""
        region, kind = self.settings.region, machine.machine_type
        wanted = machine.accelerator_type.lower().replace("_", "-")
        try:
            zones = self._zones("machineTypes", kind)
            if kind.startswith("n1-"):  # the only one that takes accelerators of its own
                zones &= self._zones("acceleratorTypes", wanted)
        except Exception as error:  # noqa: BLE001 - Vertex AI needs no Compute Engine API
            return unchecked(name, error, self.settings.project)
        regions = sorted({zone.rpartition("-")[0] for zone in zones})
        if region in regions:
            return Finding(name, "fine", "the region offers it")
        listed = f"it is in {', '.join(regions)}" if regions else "no region has it"
        mend = f'gcloud compute machine-types list --filter="name={kind}"  # then give REGION='
        return Finding(name, "failed", f"{region} does not offer it; {listed}", mend)

    def _zones(self, kind: str, name: str) -> set[str]:
        path = f"projects/{self.settings.project}/aggregated/{kind}"
        path += f"?filter={quote(f'name={name}')}&returnPartialSuccess=true"
        found, silent = set(), []
        for page in self.caller.pages("compute", path):
            items = page.get("items")  # every zone, also those that have none
            if not isinstance(items, dict):
                raise GarbageError(f"{kind} are no list by zone")
            found |= {zone.removeprefix("zones/") for zone, one in items.items() if one.get(kind)}
            silent += [str(zone).rpartition("/")[2] for zone in page.get("unreachables") or ()]
        region = self.settings.region
        silent = [zone for zone in silent if zone.startswith(f"{region}-")]
        if silent and not any(zone.startswith(f"{region}-") for zone in found):
            raise api.ServiceUnavailable(f"{silent[0]} does not answer")
        return found

    def _quota(self, name: str, machine: Machine, gpus: int) -> Finding:
        """Whether the quota is not below what is asked; how much of it is in use is not known."""
        project, region, metric = self.settings.project, self.settings.region, quota_metric(machine)
        path = f"v1beta1/projects/{project}/services/{_VERTEX}/consumerQuotaMetrics/"
        answer = self.caller.ask("serviceusage", f"{path}{quote(metric, safe='')}?view=FULL")
        limit = _limit_in(answer, region)
        short = metric.partition("/")[2]
        if limit < 0 or limit >= gpus:
            size = "without limit" if limit < 0 else str(limit)
            return Finding(name, "fine", f"quota {size}, {gpus} asked for ({short})")
        listed = f"gcloud beta quotas info list --service={_VERTEX} --project={project}"
        quota_id = f'"$({listed} --filter=metric={metric} --format="value(quotaId)")"'
        mend = (
            f"gcloud beta quotas preferences create --project={project} --service={_VERTEX}"
            f" --quota-id={quota_id} --dimensions=region={region} --preferred-value={gpus}"
        )
        said = f"quota {limit} in {region}, {gpus} asked for ({short})"
        return Finding(name, "failed", said, mend)


def alternative_name(stage: str, machine: Machine) -> str:
    """How the report calls a machine of a stage."""
    count = f"{machine.accelerator_count} x " if machine.accelerator_count > 1 else ""
    return f"{stage} on {machine.machine_type} ({count}{machine.accelerator_type})"


def _limit_in(metric: Mapping[str, Any], region: str) -> int:
    """The limit of a quota in a region; -1 is none.

    Raises:
        GarbageError: the metric has no limit by region.
    """
    for limit in metric.get("consumerQuotaLimits", ()):
        if "{region}" not in limit.get("unit", ""):
            continue
        buckets = {
            bucket.get("dimensions", {}).get("region", ""): bucket
            for bucket in limit.get("quotaBuckets", ())
        }
        bucket = buckets.get(region, buckets.get(""))
        if bucket is not None:
            try:
                return int(bucket.get("effectiveLimit", 0))  # a 0 is left out
            except (TypeError, ValueError):
                break
    raise GarbageError("a quota without a limit for each region")


def choose(
    settings: Settings, stages: Iterable[str], findings: Iterable[Finding]
) -> tuple[dict[str, Machine], list[Finding]]:
    """By stage, the first alternative that can be had; else the first that may be.

    Args:
        settings: with the stages' machines.
        stages: those to choose for.
        findings: of `Capacity.checks`.

    Returns:
        Machines by stage, and for each stage a finding that says which was taken, and why.
    """
    by_name = {finding.check: finding for finding in findings}
    chosen: dict[str, Machine] = {}
    said: list[Finding] = []
    for stage in stages:
        machine = settings.machines[stage]
        found = {one: by_name[alternative_name(stage, one)] for one in machine.alternatives}
        rank = ("fine", "unchecked", "failed")
        taken = min(found, key=lambda one: rank.index(found[one].verdict))
        chosen[stage] = taken
        finding = found[taken]
        failed = finding.verdict == "failed"
        others = [one for one in found if rank.index(found[one].verdict) > 0 and one != taken]
        if not failed:
            others = [one for one in others if list(found).index(one) < list(found).index(taken)]
        listed = "; ".join(f"{one.machine_type}: {found[one].said}" for one in others)
        why = f" ({'nor' if failed else 'taken, for'} {listed})" if listed else ""
        said.append(Finding(finding.check, finding.verdict, finding.said + why, finding.mend))
    return chosen, said
