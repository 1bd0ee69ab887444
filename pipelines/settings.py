"""Where the pipeline runs: project, places, image and machines, under one set of names.

A setting comes from the environment (``make NAME=value`` puts it there), else from the YAML file
that ``SETTINGS`` names (default ``pipeline.yaml``, if it exists), else from its default. Names of
a stage's machine start with the stage: ``ANNEAL_ACCELERATOR_COUNT``, ``PREPARE_MEMORY``.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipelines.machine_types import ATTACHED, check_pair
from pipelines.stages import DEFAULT_MACHINES, SCHEDULING, STAGES, Machine, described, listed
from trainer.runtime.errors import UsageError
from trainer.runtime.messages import brief
from trainer.runtime.near_names import near_name
from trainer.settings.secret_names import shown_name

DEFAULT_FILE = "pipeline.yaml"
LOCAL_IMAGE = "liquid-annealing/trainer:local"

_CPU = re.compile(r"\d+(\.\d+)?m?")
_MEMORY = re.compile(r"[1-9]\d*([KMGTPE]i?)?")
_CUSTOM_JOB_ONLY = ("DISK_GIB", "DISK_TYPE", "TIMEOUT_HOURS", "MACHINES", "MAX_WAIT_HOURS")
"""What plain tasks do not take, of any backend."""
_LARGEST = 2**31 - 1
_FLEX_START_HOURS = 7 * 24
"""The longest timeout that Vertex AI takes for a job of flex start."""
_LABEL_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_MODEL_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,62}")
_LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
_EXPERIMENT = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")
_TENSORBOARD = re.compile(r"projects/[^/\s]+/locations/([a-z0-9-]+)/tensorboards/[^/\s]+")


@dataclass(frozen=True)
class Settings:
    """Everything the commands around the pipeline need to know.

    Raises:
        UsageError: a machine that makes no sense.
    """

    project: str = described("", "Google Cloud project")
    region: str = described("us-central1", "region of Vertex AI")
    pipeline_root: str = described("", "gs:// prefix for the pipeline's artifacts")
    trainer_image: str = described("", "trainer image, best by digest: REPOSITORY@sha256:…")
    service_account: str = described("", "service account that the stages run as")
    network: str = described("", "VPC network: projects/NUMBER/global/networks/NAME")
    cmek_key: str = described("", "Cloud KMS key: projects/P/locations/L/keyRings/R/cryptoKeys/K")
    labels: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "labels of the run, NAME=VALUE,NAME=VALUE"}
    )
    api_endpoint: str = described("", "another endpoint of the Vertex AI interface, HOST[:PORT]")
    api_transport: str = described("", "grpc or rest; empty is the client's choice")
    poll_seconds: int = described(15, "seconds between two looks at a run that is followed")
    preflight_seconds: int = described(60, "seconds that all checks before a submission may take")
    experiment: str = described(
        "", "experiment to list the run in, on Vertex AI with its parameters and metrics"
    )
    tensorboard: str = described(
        "", "Vertex AI TensorBoard of the trainings: projects/P/locations/L/tensorboards/ID"
    )
    namespace: str = described(
        "", "your profile's namespace, where open-source Kubeflow Pipelines serves several users"
    )
    prices: str = described("", "file of prices for the estimate; empty is pipelines/prices.yaml")
    model_name: str = described(
        "", "id in the Vertex AI Model Registry to put the exported student under; empty: nowhere"
    )
    serving_image: str = described(
        "", "container that serves what goes to the registry, such as one of vLLM"
    )
    machines: Mapping[str, Machine] = field(default_factory=lambda: dict(DEFAULT_MACHINES))
    given: frozenset[str] = frozenset()
    """Names that the environment or the file gives."""

    def __post_init__(self) -> None:
        for stage, machine in self.machines.items():
            _check_machine(stage.upper(), machine)
            if machine.replicas > 1 and not STAGES[stage].trains:
                raise UsageError(
                    f"{stage.upper()}_REPLICAS={machine.replicas}: only training takes several"
                )
            if machine.accelerator_count > 1 and STAGES[stage].fans_out:
                raise UsageError(
                    f"{stage.upper()}_ACCELERATOR_COUNT={machine.accelerator_count}: each worker"
                    " uses one GPU; give PARAMS=target_workers=… for more of them"
                )
        if self.pipeline_root and "://" not in self.pipeline_root:
            raise UsageError(f"PIPELINE_ROOT={self.pipeline_root!r} must start with gs://")
        for name in ("poll_seconds", "preflight_seconds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.upper()}={getattr(self, name)} must be at least 1")
        if self.api_transport not in ("", "grpc", "rest"):
            raise UsageError(f"API_TRANSPORT={self.api_transport!r}: choose grpc or rest")
        for name, value in self.labels.items():
            if not (_LABEL_NAME.fullmatch(name) and _LABEL_VALUE.fullmatch(value)):
                raise UsageError(
                    f"LABELS: {name}={value} is not a label of Google Cloud; names and values take"
                    " lowercase letters, digits, _ and -, 63 at most, and a name starts with a"
                    " letter"
                )

    @property
    def place(self) -> str:
        """Where Vertex AI keeps the runs, by its full name."""
        return f"projects/{self.project}/locations/{self.region}"

    def processes(self, backend: str) -> dict[str, int]:
        """By stage, how many processes a backend runs: one a GPU, over all machines."""
        return {
            stage: max(1, machine.accelerator_count)
            * (machine.replicas if backend == "vertex" else 1)
            for stage, machine in self.machines.items()
        }

    def check_vertex(self) -> None:
        """Refuse what Vertex AI would refuse only when a stage starts.

        Raises:
            UsageError: an accelerator that Vertex AI does not have, that does not go with its
                machine type, or that has none.
        """
        if self.pipeline_root and not self.pipeline_root.startswith("gs://"):
            raise UsageError(f"PIPELINE_ROOT={self.pipeline_root!r} must start with gs://")
        self._check_registry()
        self.check_experiment()
        self._check_tensorboard()
        for stage, machine in self.machines.items():
            self._check_both_given(stage, machine)
            self.check_jobs(stage)
            unused = ("CPU", "MEMORY") if machine.gpu else _CUSTOM_JOB_ONLY
            why = "its machine type has them" if machine.gpu else "the stage is no custom job"
            self._refuse_unused(stage, unused, f"Vertex AI would not use it, since {why}")

    def check_jobs(self, stage: str) -> None:
        """Refuse machines of a stage, of all that it lists, that Vertex AI would refuse.

        Raises:
            UsageError: see `check_vertex`.
        """
        for one in self.machines[stage].alternatives:
            _check_custom_job(stage.upper(), one)
            if one.gpu:
                kind, count = one.accelerator_type, one.accelerator_count
                check_pair(stage.upper(), one.machine_type, kind, count)

    def check_experiment(self) -> None:
        """Refuse a name that no experiment of Vertex AI can have.

        Raises:
            UsageError: naming it.
        """
        if self.experiment and not _EXPERIMENT.fullmatch(self.experiment):
            raise UsageError(
                f"EXPERIMENT={brief(self.experiment)}: an experiment of Vertex AI is named by"
                " lowercase letters, digits and -, 128 at most, of which the first is no -"
            )

    def _check_tensorboard(self) -> None:
        """Refuse what a custom job with a TensorBoard would be refused for."""
        if not self.tensorboard:
            return
        named = f"TENSORBOARD={brief(self.tensorboard)}"
        matched = _TENSORBOARD.fullmatch(self.tensorboard)
        if matched is None:
            raise UsageError(f"{named} must be projects/P/locations/L/tensorboards/ID")
        if matched[1] != self.region:
            raise UsageError(
                f"{named} is in {matched[1]}, but REGION={self.region}; make them agree"
            )
        for name in ("service_account", "pipeline_root"):
            if not getattr(self, name):
                raise UsageError(f"{named} without {name.upper()}, which its jobs need; give both")

    def check_kubeflow(self) -> None:
        """Refuse what open-source Kubeflow Pipelines would ignore silently, or reject.

        Raises:
            UsageError: several machines, Vertex AI's ways to get them, or Google Cloud's settings.
        """
        for name in ("network", "cmek_key", "labels", "tensorboard"):
            if getattr(self, name):
                raise UsageError(
                    f"{name.upper()} is for Vertex AI; leave it out for open-source Kubeflow"
                    f" Pipelines, or name another file in SETTINGS"
                )
        if "@" in self.service_account:
            raise UsageError(
                f"SERVICE_ACCOUNT={self.service_account!r} is one of Google Cloud; give the name of"
                " a Kubernetes service account, or leave it out"
            )
        for stage, machine in self.machines.items():
            for key in _custom_only(machine):
                raise UsageError(
                    f"{stage.upper()}_{key} is for Vertex AI; leave it out for open-source"
                    " Kubeflow Pipelines"
                )
            unused = ("MACHINE_TYPE", *_CUSTOM_JOB_ONLY)
            self._refuse_unused(stage, unused, "open-source Kubeflow Pipelines would not use it")

    def registry(self) -> dict[str, Any]:
        """Where the registry is and what goes there beside the model, as its stage takes it."""
        names = ("model_name", "project", "region", "serving_image", "cmek_key")
        shown = {name: getattr(self, name) for name in (*names, "api_endpoint", "api_transport")}
        return shown | {"labels": dict(self.labels)}

    def check_no_registry(self) -> None:
        """Refuse the model registry where there is none.

        Raises:
            UsageError: it is asked for.
        """
        if self.model_name:
            raise UsageError(
                f"MODEL_NAME={self.model_name!r}: the model registry is Vertex AI's; leave it out"
                " for another backend, or name another file in SETTINGS"
            )

    def _check_registry(self) -> None:
        if not self.model_name:
            if self.serving_image:
                raise UsageError(
                    f"SERVING_IMAGE={self.serving_image!r} without MODEL_NAME, under which the"
                    " student would go to the model registry; give both"
                )
            return
        if not _MODEL_NAME.fullmatch(self.model_name):
            raise UsageError(
                f"MODEL_NAME={self.model_name!r} is no id of a model; it takes lowercase letters,"
                " digits, _ and -, 63 at most, and starts with a letter or _"
            )
        if not self.serving_image:
            raise UsageError(
                f"MODEL_NAME={self.model_name!r} without SERVING_IMAGE: the registry wants to know"
                " what serves the model; name a container that takes Hugging Face directories"
            )
        # The stage finds the registry by them
        self.require("project", "region")

    def _check_both_given(self, stage: str, machine: Machine) -> None:
        """Refuse a machine type of another family, or an accelerator, without its counterpart.

        The default of the one that is not given would make a pair that no machine has.
        """
        default = DEFAULT_MACHINES[stage]
        changed = {
            "machine_type": machine.family != default.family,
            "accelerator_type": machine.accelerator_type != default.accelerator_type,
        }
        if machine.machines:
            return  # each entry has both
        for name, other in (tuple(changed), tuple(changed)[::-1]):
            absent = f"{stage}_{other}".upper() not in self.given
            if default.gpu and machine.gpu and changed[name] and absent:
                raise UsageError(
                    f"{stage.upper()}_{name.upper()}={getattr(machine, name)} without"
                    f" {stage.upper()}_{other.upper()}, whose default is"
                    f" {getattr(machine, other)}; give both"
                )

    def _refuse_unused(self, stage: str, keys: Iterable[str], why: str) -> None:
        for name in (f"{stage}_{key}".upper() for key in keys):
            if name in self.given:
                raise UsageError(f"{name}: {why}; leave it out, or name another file in SETTINGS")

    def require(self, *names: str, beside: Mapping[str, str] | None = None) -> Settings:
        """Itself, if every setting named has a value.

        Args:
            names: of settings.
            beside: further ones that are missing, and what they are.

        Raises:
            UsageError: naming all that are missing, what they are, and how to set them.
        """
        helps = {spec.name: spec.metadata.get("help", "") for spec in fields(self)}
        missing = {name.upper(): helps[name] for name in names if not getattr(self, name)}
        missing |= beside or {}
        if missing:
            listed = "; ".join(f"{name} ({what})" for name, what in missing.items())
            # Those beside belong to one command, not to the settings file
            kept = ", ".join(name for name in missing if name not in (beside or {}))
            which = f"{kept} " if beside else ""
            file = f", or {which}in {DEFAULT_FILE}" if kept else ""
            raise UsageError(
                f"missing: {listed}. Set {'them' if len(missing) > 1 else 'it'} in the environment,"
                f" as make {next(iter(missing))}=…{file}"
            )
        return self


def _check_machine(name: str, machine: Machine) -> None:
    if machine.accelerator_count and not machine.accelerator_type:
        raise UsageError(
            f"{name}_ACCELERATOR_COUNT={machine.accelerator_count} without"
            f" {name}_ACCELERATOR_TYPE; give for example NVIDIA_TESLA_A100, or a count of 0"
        )
    for spec in fields(machine):
        value, least = getattr(machine, spec.name), spec.metadata["least"]
        if least is not None and value < least:
            raise UsageError(f"{name}_{spec.name.upper()}={value} must be at least {least}")
        if spec.metadata["most"] is not None and value > spec.metadata["most"]:
            most = spec.metadata["most"]
            raise UsageError(f"{name}_{spec.name.upper()}={value} must be at most {most}")
    if machine.scheduling not in SCHEDULING:
        raise UsageError(
            f"{name}_SCHEDULING={machine.scheduling!r}: choose one of {', '.join(SCHEDULING)}"
        )
    if not _CPU.fullmatch(machine.cpu) or not float(machine.cpu.removesuffix("m")):
        raise UsageError(f"{name}_CPU={machine.cpu!r}: a number of cores is needed, such as 4")
    if not _MEMORY.fullmatch(machine.memory):
        raise UsageError(f"{name}_MEMORY={machine.memory!r}: write it as 32Gi or 32G")


def _custom_only(machine: Machine) -> list[str]:
    """Which settings a machine has that no plain task takes."""
    given = {"REPLICAS": machine.replicas > 1, "SCHEDULING": machine.scheduling != "standard"}
    return [key for key, present in given.items() if present]


def _check_custom_job(name: str, machine: Machine) -> None:
    from google.cloud.aiplatform_v1 import AcceleratorType

    kind = machine.accelerator_type
    if not machine.gpu:
        for key in _custom_only(machine):
            raise UsageError(
                f"{name}_{key} is for a custom job, and only stages with a GPU are one; give"
                f" {name}_ACCELERATOR_TYPE and {name}_ACCELERATOR_COUNT, or leave {key} out"
            )
        return
    known = AcceleratorType.__members__
    if kind not in known:
        raise UsageError(
            f"{name}_ACCELERATOR_TYPE={kind!r} is none of Vertex AI's{nearest(kind, known)}"
        )
    if not machine.machine_type:
        raise UsageError(
            f"{name}_ACCELERATOR_TYPE={kind} without {name}_MACHINE_TYPE; Vertex AI needs a machine"
            " type to put it in, for example g2-standard-12 for NVIDIA_L4"
        )
    if machine.scheduling != "flex_start":
        return
    if kind in ATTACHED:
        raise UsageError(
            f"{name}_SCHEDULING=flex_start is not for {kind}; choose standard or spot, or another"
            " accelerator"
        )
    if machine.timeout_hours > _FLEX_START_HOURS:
        raise UsageError(
            f"{name}_TIMEOUT_HOURS={machine.timeout_hours}: with {name}_SCHEDULING=flex_start a job"
            f" may take {_FLEX_START_HOURS} at most"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on a wrong name: which one may be meant; empty where none comes near."""
    near = near_name(name, known)
    return f"; did you mean {near}?" if near else ""


def known_names() -> dict[str, str]:
    """Every setting's name and what it is, machines by stage."""
    names = {spec.name.upper(): spec.metadata["help"] for spec in fields(Settings) if spec.metadata}
    for stage in DEFAULT_MACHINES:
        for spec in fields(Machine):
            names[f"{stage}_{spec.name}".upper()] = f"{stage}: {spec.metadata['help']}"
    return names


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings from environment, file and defaults.

    Raises:
        UsageError: the file cannot be read or has an unknown name, or a value is not of its type.
    """
    known = known_names()
    given = _from_file(environ, known)
    given |= {name: environ[name] for name in _known_in(environ, known)}
    values: dict[str, Any] = {}
    machines: dict[str, dict[str, Any]] = {stage: {} for stage in DEFAULT_MACHINES}
    for name, text in given.items():
        stage, _, rest = name.lower().partition("_")
        if stage in machines and rest in {spec.name for spec in fields(Machine)}:
            machines[stage][rest] = _converted(name, text, type(getattr(Machine(), rest)))
        else:
            kind = {"labels": dict}.get(name.lower(), type(getattr(Settings, name.lower(), "")))
            values[name.lower()] = _converted(name, text, kind)
    merged = {
        stage: replace(DEFAULT_MACHINES[stage], **_with_first_listed(stage, changes))
        for stage, changes in machines.items()
    }
    return Settings(machines=merged, given=frozenset(given), **values)


def _with_first_listed(stage: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What is given for a stage's machine; where it lists several, on the first of them."""
    name = f"{stage}_machines".upper()
    try:
        alternatives = listed(changes.get("machines", ""))
    except ValueError as error:
        raise UsageError(
            f"{name}: {brief(str(error))} is not TYPE:ACCELERATOR:COUNT, such as"
            " a3-highgpu-1g:NVIDIA_H100_80GB:1"
        ) from None
    if not alternatives:
        return changes
    for key in alternatives[0]:
        if key in changes:
            raise UsageError(
                f"{name} and {stage.upper()}_{key.upper()} are both given; leave one out"
            )
    return changes | alternatives[0]


def _known_in(environ: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """The names of settings in the environment.

    Raises:
        UsageError: a name that looks like a stage's and is none.
    """
    keys = [spec.name.upper() for spec in fields(Machine)]
    for name in environ:
        stage, _, key = name.partition("_")
        if instead := renamed(name):
            raise UsageError(instead)
        # Others may use such a prefix too, so only what comes near a name is taken for a mistake
        if stage.lower() in DEFAULT_MACHINES and key not in keys:
            near = difflib.get_close_matches(key, keys, 1, cutoff=0.75)
            if near:
                raise UsageError(f"unknown setting {name}; did you mean {stage}_{near[0]}?")
    return [name for name in known if environ.get(name)]


def former_names() -> list[str]:
    """Names of earlier releases, see `renamed`."""
    return [f"{stage.upper()}_SPOT" for stage, machine in DEFAULT_MACHINES.items() if machine.gpu]


def renamed(name: str) -> str:
    """What to give instead of a name of an earlier release; empty for any other name."""
    stage, _, key = name.upper().partition("_")
    if key != "SPOT" or stage.lower() not in DEFAULT_MACHINES:
        return ""
    return f"{name} is of an earlier release; give {stage}_SCHEDULING=spot instead of {name}=1"


def settings_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where settings are read from, if it exists."""
    return Path(environ.get("SETTINGS") or DEFAULT_FILE)


def _from_file(environ: Mapping[str, str], known: Mapping[str, str]) -> dict[str, Any]:
    from trainer.settings.text_yaml import LONGEST, read_settings  # needs what is installed first

    path = settings_file(environ)
    if not path.exists():
        if environ.get("SETTINGS"):
            raise UsageError(f"SETTINGS={str(path)!r} does not exist")
        return {}
    content = read_settings(path, str(path))
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).upper()
        if name in found:
            raise UsageError(f"{path}: {name} is given twice")
        if instead := renamed(name):
            raise UsageError(f"{path}: {instead}")
        if name not in known:
            shown = brief(shown_name(str(key), known))
            raise UsageError(f"{path}: unknown setting {shown}{nearest(name, known)}")
        if len(str(value)) > LONGEST:
            raise UsageError(f"{path}: {name} has more than {LONGEST} characters")
        if value is not None:
            found[name] = value
    return found


def _converted(name: str, value: Any, kind: type) -> Any:
    if kind is dict:
        if isinstance(value, dict):
            return {str(key): "" if entry is None else str(entry) for key, entry in value.items()}
        pairs = [pair.partition("=") for pair in str(value).split(",") if pair.strip()]
        if not all(key.strip() and sign for key, sign, _ in pairs):
            raise UsageError(f"{name}={value!r}: write NAME=VALUE,NAME=VALUE")
        return {key.strip(): entry.strip() for key, _, entry in pairs}
    if isinstance(value, (dict, list)):
        raise UsageError(f"{name}={value!r}: one value is needed")
    text = str(value)
    try:
        converted = kind(text)
    except ValueError:
        raise UsageError(f"{name}={brief(text)}: a whole number is needed") from None
    if kind is int and converted > _LARGEST:
        raise UsageError(f"{name}={brief(text)} must be at most {_LARGEST}")
    return converted
