"""The pipeline's parameters as users give them: ``PARAMS="continue_train_steps=8000 seed=7"``.

A parameter is a setting of the trainer, for one stage (``continue_train_steps``) or for all
(``seed``), so the trainer's own checks find a wrong one before anything is sent or started.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any, NoReturn

from pipelines.anneal import build_pipeline
from pipelines.settings import Settings, nearest
from pipelines.stages import CACHED, ONLINE, STAGES
from trainer.loss.divergences import LINEAR_SCHEME
from trainer.runtime.errors import UsageError
from trainer.runtime.messages import brief
from trainer.runtime.near_names import near_name
from trainer.settings.accumulation import with_accumulation
from trainer.settings.config import (
    REQUIRED,
    SETTINGS,
    TargetSettings,
    check_shapes,
)
from trainer.settings.layers import Resolved, for_evaluation, resolve
from trainer.settings.secret_names import shown_name, without_values
from trainer.settings.values import given

_STAGES = [stage.key for stage in STAGES.values() if stage.configurable]
DEFAULT_METRIC = "val_loss_student"
_OTHER_NAMES = {"temperature": "T", "resize_method": "pos_resize"}
"""Parameters that the trainer has another name for."""
_NO_SETTING = (
    "teacher",
    "target_workers",
    "target_bytes",
    "best_metric",
    "export",
    "export_license",
    "lm_eval_tasks",
    "lm_eval_limit",
)
"""Parameters that are no settings of the trainer."""
_OWN_HELP = {
    "best_metric": "metric that decides which checkpoint of each training goes on; lower is better",
    "resume_gcs_uri": "checkpoint to anneal from, gs://…; empty starts from scratch",
    "grad_accum": "micro-batches per update; 0 makes it 64 windows an update",
    "more_settings": "any further settings of the trainer, a JSON object",
    "eval_ctx_lens": "contexts to evaluate at, in tokens, e.g. 512,1024",
    "teacher": "online: each training runs it; cached: it runs once, trainings read its targets",
    "target_workers": "machines that run a cached teacher, each over its share of the tokens",
    "target_bytes": "bytes that a cached teacher's targets take for each token",
    "export": "true writes the final student in Hugging Face format, with a model card",
    "export_license": "its license for the model card, e.g. apache-2.0; empty is unknown",
    "lm_eval_tasks": "tasks of lm-eval to run on the exported student, e.g. lambada_openai,piqa",
    "lm_eval_limit": "examples of each of these tasks; 0 is all of them",
    "teacher_name": "teacher: a Hugging Face causal LM by hub name or gs:// directory",
    "dataset_name": "data set: hub name, or gs:// directory or file of text, json or parquet",
    "block_size": "training context in tokens",
    "train_steps": "optimizer updates",
    "lr_peak": "peak learning rate",
    "micro_batch": "windows per forward pass of one process",
}
"""Descriptions of parameters that the trainer's own do not fit."""
_GIVEN_BY_STAGE = {
    "save_best_on": "give best_metric",
    "teacher_targets": "give teacher=cached",
    "resume_gcs_uri": "the annealing alone resumes, from the parameter of that name",
    "tokens_dir": "it is the output of the first stage",
    "output_gcs_uri": "it is where the stage's output belongs",
    "hf_token_value": "it would be stored with the run; give hf_secret_name",
}
"""What `more_settings` may not hold, beside what has a parameter, and what to do instead."""
_SWITCH = {"true": True, "1": True, "false": False, "0": False}
_MOST_WORKERS = 64
"""Of a cached teacher; each is a machine of its own."""
_MOST_EXACT = 2**53
"""Runs store numbers as doubles, which hold every whole number up to this one."""
_FLAG = re.compile(r"(?<![\w-])--([A-Za-z]\w*)")
_SECRET = re.compile(r"projects/[^/\s]+/secrets/[^/\s]+(/versions/[^/\s]+)?")
_OBJECT = re.compile(r"gs://[a-z0-9][a-z0-9._-]+/.+")


@functools.cache
def parameter_defaults() -> dict[str, Any]:
    """Every parameter, named by stage, with its default."""
    function = build_pipeline(Settings(), "local").pipeline_func
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }


def parameter_help(name: str) -> str:
    """What a parameter is, in the words of the trainer's setting where there is one."""
    _, rest = split_stage(name)
    return _OWN_HELP.get(rest) or str(SETTINGS[setting_of(rest)].metadata["help"])


def split_stage(name: str) -> tuple[str, str]:
    """A parameter's stage (empty: all of them) and its name there."""
    stage, _, rest = name.partition("_")
    return (stage, rest) if stage in _STAGES else ("", name)


def parse_parameters(text: str) -> dict[str, Any]:
    """``name=value`` pairs separated by spaces; values with spaces in quotes, dicts as JSON.

    Raises:
        UsageError: an unknown parameter, with the nearest known one, or a value of another type.
    """
    defaults = parameter_defaults()
    try:
        pieces = shlex.split(text)
    except ValueError as error:
        # What stands there may be a secret
        raise UsageError(f"PARAMS is not name=value pairs in a shell's quotes: {error}") from None
    parsed: dict[str, Any] = {}
    for piece in pieces:
        name, sign, value = piece.partition("=")
        if not sign:
            raise UsageError(f"PARAMS: {shown_name(piece, defaults)!r} is not name=value")
        if name not in defaults:
            shown = shown_name(name, defaults)
            raise UsageError(f"PARAMS: unknown parameter {shown!r}{nearest(name, defaults)}")
        parsed[name] = _converted(name, value, type(defaults[name]))
    return parsed


def _converted(name: str, value: str, kind: type) -> Any:
    try:
        if kind is dict:
            converted = json.loads(value, parse_constant=_no_constant)
            if not isinstance(converted, dict):
                raise ValueError
            return converted
        converted = _SWITCH[value.lower()] if kind is bool else kind(value)
        if kind is float and not math.isfinite(converted):
            raise ValueError
        if kind is int and abs(converted) > _MOST_EXACT:
            raise UsageError(f"PARAMS: {name}={value!r}: {_MOST_EXACT} is the most")
        return converted
    except (ValueError, KeyError, RecursionError):
        wanted = {
            bool: "true or false is needed",
            int: "a whole number is needed",
            float: "a number is needed",
            dict: f"a JSON object is needed, quoted as in {name}='{{\"dropout\": 0.1}}'",
        }[kind]
        raise UsageError(f"PARAMS: {name}={brief(without_values(value))}: {wanted}") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity, which only Python's JSON knows


def check_parameters(values: Mapping[str, Any], processes: Mapping[str, int] | None = None) -> None:
    """Find what a stage would refuse once it runs, hours later perhaps.

    Args:
        values: parameters, over the defaults.
        processes: by training stage, how many GPUs take part; one each by default.

    Raises:
        UsageError: the stage, the trainer's setting, its value and what is allowed.
    """
    values = parameter_defaults() | dict(values)
    _check_targets(values)
    _check_export(values)
    metric = values["best_metric"] or DEFAULT_METRIC
    for stage in _STAGES:
        try:
            _check_more(values[f"{stage}_more_settings"], stage)
            resolved = stage_settings(values, stage)
            if stage == "evaluate":
                for_evaluation(resolved.config, "teacher_name")  # tokens are of the first stage
                continue
            gpus = (processes or {}).get(stage, 1)
            check_training(resolved, metric, gpus, shapes=stage == "anneal")
        except UsageError as error:
            raise UsageError(f"PARAMS for stage {stage}: {_as_typed(error, stage)}") from None


def _parameters_of(stage: str) -> dict[str, str]:
    """By the trainer's name of a setting: the parameter that gives it to a stage."""
    split = {name: split_stage(name) for name in parameter_defaults()}
    return {setting_of(rest): name for name, (of, rest) in split.items() if of in ("", stage)}


def _as_typed(error: UsageError, stage: str) -> str:
    """What the trainer says of its flags, with the names of the parameters that give them."""
    names = _parameters_of(stage)

    def typed(match: re.Match[str]) -> str:
        return names.get(match[1], match[1]) if match[1] in SETTINGS else match[0]

    return _FLAG.sub(typed, str(error))


def stage_values(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """What parameters give to a stage, by the trainer's names.

    Args:
        values: every parameter.
        stage: one that takes settings of the trainer, by its key.
    """
    named = {split_stage(name): value for name, value in values.items() if name not in _NO_SETTING}
    own = {rest: value for (of, rest), value in named.items() if of in ("", stage)}
    more = own.pop("more_settings")
    asked = {setting_of(name): value for name, value in own.items()}
    if asked.get("grad_accum") == 0:
        del asked["grad_accum"]
    return asked | more


def stage_settings(values: Mapping[str, Any], stage: str) -> Resolved:
    """The trainer's settings that a stage runs with; arguments as those of `stage_values`.

    Raises:
        UsageError: a value is not one that its setting can take.
    """
    return resolve(given(**stage_values(values, stage)), {})


def setting_of(rest: str) -> str:
    """The trainer's name of a parameter, whose stage has been taken off."""
    return _OTHER_NAMES.get(rest, rest)


def check_training(resolved: Resolved, metric: str, processes: int, *, shapes: bool) -> Resolved:
    """Check a training's settings as it will itself once it runs; returns them completed.

    Args:
        resolved: of the trainer, as parameters give them.
        metric: that decides which checkpoint is best.
        processes: how many take part.
        shapes: whether a student is built from them, where no checkpoint is given.

    Raises:
        UsageError: the setting, its value and what is allowed.
    """
    config = resolved.config
    config.require(*REQUIRED)
    if config.train_steps == 0:
        raise UsageError("--train_steps=0 trains nothing; at least 1 update is needed")
    if metric not in config.student_metrics:
        near = near_name(metric, config.student_metrics)
        hint = f"did you mean {near}?" if near else f"it gives {config.student_metrics}"
        raise UsageError(f"best_metric={metric!r} is not evaluated there; {hint}")
    if shapes and not config.resume_gcs_uri:
        check_shapes(resolved.values)
    return with_accumulation(resolved, processes)


def _check_targets(values: Mapping[str, Any]) -> None:
    """Refuse what a cached teacher could not serve."""
    teacher, workers = values["teacher"], values["target_workers"]
    size = values["target_bytes"]
    if teacher not in (ONLINE, CACHED):
        raise UsageError(f"PARAMS: teacher={teacher!r}: choose {ONLINE} or {CACHED}")
    if not 1 <= workers <= _MOST_WORKERS:
        raise UsageError(
            f"PARAMS: target_workers={workers} must be at least 1 and at most {_MOST_WORKERS}"
        )
    try:
        TargetSettings(target_bytes=size)
    except UsageError as error:
        raise UsageError(f"PARAMS: {_as_typed(error, '')}") from None
    if teacher == ONLINE:
        return
    sizes = sorted((values["anneal_block_size"], values["continue_block_size"]))
    if sizes[0] > 0 and sizes[1] % sizes[0]:
        raise UsageError(
            f"PARAMS: teacher={CACHED} takes contexts of which one divides the other;"
            f" anneal_block_size={values['anneal_block_size']} and"
            f" continue_block_size={values['continue_block_size']} do not, so give others, or"
            f" teacher={ONLINE}"
        )
    for stage in ("anneal", "continue"):
        scheme = values[f"{stage}_more_settings"].get("kd_scheme", LINEAR_SCHEME)
        if scheme != LINEAR_SCHEME:
            raise UsageError(
                f"PARAMS for stage {stage}: kd_scheme={scheme!r} needs the teacher's whole"
                f" distribution; give teacher={ONLINE}, or kd_scheme={LINEAR_SCHEME}"
            )


def _check_export(values: Mapping[str, Any]) -> None:
    """Refuse what would do nothing."""
    export, tasks = values["export"], values["lm_eval_tasks"]
    limit, license = values["lm_eval_limit"], values["export_license"]
    if limit < 0:
        raise UsageError(f"PARAMS: lm_eval_limit={limit} must be at least 0")
    if limit and not tasks:
        raise UsageError(f"PARAMS: lm_eval_limit={limit} without lm_eval_tasks does nothing")
    for name, value in (("lm_eval_tasks", tasks), ("export_license", license)):
        if value and not export:
            raise UsageError(
                f"PARAMS: {name}={brief(value)} is for the exported student; leave it out, or give"
                " export=true"
            )


def _check_more(more: Mapping[str, Any], stage: str) -> None:
    """Refuse in ``more_settings`` what has a parameter, or what the stage itself sets."""
    advice = {name: f"give {parameter}" for name, parameter in _parameters_of(stage).items()}
    advice |= _GIVEN_BY_STAGE
    for name, value in more.items():
        # A number's parameter cannot hold the word
        if name in advice and (name, value) != ("micro_batch", "auto"):
            raise UsageError(f"{name} is not for {stage}_more_settings: {advice[name]}")


def parameters_to_send(settings: Settings, backend: str) -> dict[str, Any]:
    """What ``PARAMS`` gives, if a submission may have it.

    Raises:
        UsageError: a parameter that is unknown, that a stage would refuse, or that no stage can
            use where it runs.
    """
    parameters = parse_parameters(os.environ.get("PARAMS", ""))
    check_parameters(parameters, settings.processes(backend))
    check_cloud_parameters(parameters)
    check_data_set(parameters)
    if settings.model_name and not parameters.get("export", True):
        raise UsageError(
            f"PARAMS: export=false leaves nothing to register as MODEL_NAME={settings.model_name};"
            " leave one of them out"
        )
    return parameters


def check_cloud_parameters(values: Mapping[str, Any]) -> None:
    """Refuse what exists on this machine, but not where the stages run.

    Raises:
        UsageError: a checkpoint that is not in a bucket, a teacher or a data set of this machine,
            or a secret not named in full.
    """
    checkpoint = values.get("resume_gcs_uri") or ""
    if checkpoint and not _OBJECT.fullmatch(checkpoint):
        raise UsageError(
            f"PARAMS: resume_gcs_uri={checkpoint!r}: no stage can read it there; copy it to"
            " gs://BUCKET/NAME"
        )
    for name in ("teacher_name", "dataset_name"):
        place = values.get(name) or ""
        # One that is not here may be in the image, and Vertex AI mounts buckets under /gcs
        if place.startswith((".", "~", "/")) and os.path.exists(os.path.expanduser(place)):
            raise UsageError(
                f"PARAMS: {name}={place!r} is on this machine, where no stage can read it; give a"
                " hub name or gs://BUCKET/NAME"
            )
    secret = values.get("hf_secret_name") or ""
    if secret and not _SECRET.fullmatch(secret):
        raise UsageError(
            f"PARAMS: hf_secret_name={secret!r}: write projects/P/secrets/S[/versions/V]"
        )


def check_data_set(given: Mapping[str, Any]) -> None:
    """Refuse another data set with the configuration that belongs to the default one.

    The first stage would find that out on its machine.

    Args:
        given: the parameters that the user gave, without defaults.

    Raises:
        UsageError: ``dataset_name`` is given without ``dataset_config``.
    """
    default = parameter_defaults()
    name = given.get("dataset_name") or default["dataset_name"]
    if "dataset_config" in given or name.rpartition("/")[2] == default["dataset_name"]:
        return
    raise UsageError(
        f"PARAMS: dataset_name={brief(name)} without dataset_config, whose default"
        f" {default['dataset_config']} is of {default['dataset_name']}; give both, as"
        " dataset_config= where there is none"
    )
