"""The pipeline: anneal at a short context, stretch the best checkpoint, continue at a longer one.

    prepare → anneal → pick best → resize and reset → continue → pick best → evaluate, export

With ``teacher`` = ``cached`` the teacher runs ahead of both trainings, over the token stream, on
several machines at a time:

    prepare → plan targets → teacher targets (one task a worker) → join targets → anneal, continue

Parameters are named by stage and default to a run at context 512 and its continuation at 1024. No
input holds a time or a job id, so a task whose inputs are as before is found in the cache.
"""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kfp import dsl

from components.evaluate import evaluate
from components.export_hf import export_hf
from components.join_targets import join_targets
from components.lm_eval_tasks import lm_eval_tasks as run_lm_eval
from components.no_targets import no_targets
from components.pick_best import pick_best
from components.plan_targets import plan_targets
from components.prepare_tokens import prepare_tokens
from components.register_model import register_model
from components.resize_reset import resize_reset
from components.teacher_targets import teacher_targets
from components.train import train
from pipelines.settings import LOCAL_IMAGE, Settings
from pipelines.stages import CACHED, ONLINE, SCHEDULING, STAGES, Machine, Stage
from trainer.runtime.devices import EXPECTED_GPUS
from trainer.runtime.provenance import STAGE_IMAGE

NAME = "liquid-annealing"
_OF_TEACHER = ("teacher_name", "teacher_revision", "eval_ctx_lens", "hf_secret_name")
"""The parameters of every stage that runs a teacher, or may."""


class Outputs(NamedTuple):
    """The pipeline's outputs: the report, as a page and as text, and both best checkpoints."""

    report: dsl.HTML
    table: dsl.Markdown
    before: dsl.Model
    after: dsl.Model


_SHELL_CALL = re.compile(r"^\s*(_KFP_RUNTIME=true) (python3 -m kfp\.)", re.MULTILINE)
BLOCKING = ("env", "--block-signal=TERM")
"""Starts a command with the signal blocked; the image has it, of GNU's coreutils."""
BACKENDS = ("vertex", "kfp", "local")
KUBERNETES_GPU = "nvidia.com/gpu"


def build_pipeline(settings: Settings, backend: str) -> Any:
    """The pipeline for a backend, its image and machines put in.

    Args:
        settings: image and machines.
        backend: ``vertex`` runs GPU stages as custom training jobs (machine type, disk,
            scheduling, timeout, several machines); ``kfp`` as plain tasks that ask for GPUs;
            ``local`` asks for nothing.

    Raises:
        UsageError: machines that the backend would refuse, or could not give.
    """
    if backend == "vertex":
        settings.check_vertex()
    else:
        settings.check_no_registry()
    if backend == "kfp":
        settings.check_kubeflow()
    stage = task_maker(settings, backend, STAGES)

    @dsl.pipeline(name=NAME, description="Distil a language model at a short, then a long context")
    def anneal_and_continue(
        teacher_name: str = "gpt2-xl",
        teacher_revision: str = "",
        teacher: str = ONLINE,
        target_workers: int = 4,
        target_bytes: int = 64,
        dataset_name: str = "wikitext",
        dataset_config: str = "wikitext-103-raw-v1",
        dataset_revision: str = "",
        text_column: str = "text",
        hf_secret_name: str = "",
        resume_gcs_uri: str = "",
        eval_ctx_lens: str = "512,1024",
        best_metric: str = "val_loss_student",
        seed: int = 42,
        anneal_block_size: int = 512,
        anneal_train_steps: int = 1200,
        anneal_warmup_steps: int = 200,
        anneal_lr_peak: float = 2.7e-4,
        anneal_alpha: float = 0.5,
        anneal_temperature: float = 1.0,
        anneal_alpha_schedule: str = "0:0.7,400:0.5,800:0.3",
        anneal_temp_schedule: str = "0:1.2,800:1.0",
        anneal_grad_accum: int = 0,
        anneal_micro_batch: int = 8,
        anneal_eval_every: int = 100,
        anneal_save_every: int = 200,
        anneal_log_interval: int = 50,
        anneal_more_settings: dict = {},  # noqa: B006 - kfp records the value itself
        resize_method: str = "linear",
        continue_block_size: int = 1024,
        continue_train_steps: int = 6000,
        continue_warmup_steps: int = 400,
        continue_lr_peak: float = 2.7e-4,
        continue_alpha: float = 0.5,
        continue_temperature: float = 1.0,
        continue_alpha_schedule: str = "0:0.5,2000:0.4,4000:0.3",
        continue_temp_schedule: str = "",
        continue_grad_accum: int = 2,
        continue_micro_batch: int = 8,
        continue_eval_every: int = 500,
        continue_save_every: int = 500,
        continue_log_interval: int = 50,
        continue_more_settings: dict = {},  # noqa: B006
        evaluate_micro_batch: int = 8,
        evaluate_more_settings: dict = {},  # noqa: B006
        export: bool = True,
        export_license: str = "",
        lm_eval_tasks: str = "",
        lm_eval_limit: int = 0,
    ) -> Outputs:
        return _both_phases(stage, backend, dict(locals()), settings)

    return anneal_and_continue


def _both_phases(
    stage: Callable[[str, Any], Callable[..., Any]],
    backend: str,
    given: Mapping[str, Any],
    settings: Settings,
) -> Outputs:
    """The tasks of the pipeline, and what it gives.

    Args:
        stage: makes tasks.
        backend: says how many workers of the teacher run together.
        given: the pipeline's parameters.
        settings: say whether the student goes to the model registry.
    """
    streams = prepared(stage, given)
    taught = {name: given[name] for name in _OF_TEACHER}
    training = {
        **taught,
        "teacher_targets": _targets(stage, backend, streams, given),
        "save_best_on": given["best_metric"],
        "seed": given["seed"],
    }
    short = stage("anneal", train)(
        tokens=streams, resume_gcs_uri=given["resume_gcs_uri"], **training, **_own(given, "anneal")
    )
    before = _best(stage("pick", pick_best), short, given)
    resized = stage("resize", resize_reset)(
        checkpoint=before,
        block_size=given["continue_block_size"],
        pos_resize=given["resize_method"],
    )
    long = stage("continue", train)(
        tokens=streams,
        initial=resized.outputs["resized"],
        compiled=short.outputs["checkpoints"],
        **training,
        **_own(given, "continue"),
    )
    after = _best(stage("pick_again", pick_best), long, given)
    table = stage("evaluate", evaluate)(
        tokens=streams,
        before=before,
        after=after,
        record_before=short.outputs["record"],
        record_after=long.outputs["record"],
        **taught,
        **_own(given, "evaluate"),
    )
    _export(stage, after, given, settings)
    report, shown = table.outputs["report"], table.outputs["table"]
    return Outputs(report=report, table=shown, before=before, after=after)


def _own(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What parameters give to a stage alone, by the names of its component's inputs."""
    start = f"{key}_"
    return {n.removeprefix(start): v for n, v in given.items() if n.startswith(start)}


def _best(pick: Callable[..., Any], training: Any, given: Mapping[str, Any]) -> Any:
    """The best checkpoint of a training."""
    picked = pick(checkpoints=training.outputs["checkpoints"], metric=given["best_metric"])
    return picked.outputs["best"]


def prepared(stage: Callable[[str, Any], Callable[..., Any]], given: Mapping[str, Any]) -> Any:
    """The token streams, made by the first task.

    Args:
        stage: makes tasks.
        given: the pipeline's parameters.
    """
    of_data_set = ("dataset_name", "dataset_config", "dataset_revision", "text_column")
    names = ("teacher_name", "teacher_revision", *of_data_set, "hf_secret_name")
    making = stage("prepare", prepare_tokens)(**{name: given[name] for name in names})
    return making.outputs["tokens"]


def at_a_time(backend: str, most: int = 0) -> int:
    """How many tasks of a loop run together, ``most`` where a backend can; 0 is all of them.

    In the local runner, tasks that run at the same time spoil each other's output.
    """
    return 1 if backend == "local" else most


def made_targets(
    stage: Callable[[str, Any], Callable[..., Any]],
    backend: str,
    streams: Any,
    shares: Any,
    given: Mapping[str, Any],
) -> Mapping[str, Any]:
    """The outputs of the task that joins the teacher's targets, after the workers that make them.

    Args:
        stage: makes tasks.
        backend: says how many workers run together.
        streams: the token streams.
        shares: of the workers.
        given: the pipeline's parameters.
    """
    own = {name: given[name] for name in _OF_TEACHER}
    with dsl.ParallelFor(shares, name="shares", parallelism=at_a_time(backend)) as share:
        shards = stage("targets", teacher_targets)(tokens=streams, share=share, **own)
    joined = stage("join", join_targets)(places=dsl.Collected(shards.outputs["place"]))
    return dict(joined.outputs)


def _targets(
    stage: Callable[[str, Any], Callable[..., Any]],
    backend: str,
    streams: Any,
    given: Mapping[str, Any],
) -> Any:
    """Where the trainings find the teacher's targets; an empty text where they run the teacher.

    Neither the seed nor a schedule's steps are among the inputs of what costs: another run of the
    same temperatures takes the targets from the cache.

    Args:
        stage: makes tasks.
        backend: says how many workers run together.
        streams: the token streams.
        given: the pipeline's parameters.
    """
    with dsl.If(given["teacher"] == CACHED, name=CACHED):
        # The local runner goes over a task's only output alone, not over one of several
        shares = stage("plan", plan_targets)(
            target_workers=given["target_workers"],
            target_bytes=given["target_bytes"],
            **{
                f"{key}_{name}": given[f"{key}_{name}"]
                for key in ("anneal", "continue")
                for name in ("block_size", "temperature", "temp_schedule")
            },
        ).output
        joined = made_targets(stage, backend, streams, shares, given)
    with dsl.Else(name=ONLINE):
        none = stage("online", no_targets)()
    return dsl.OneOf(joined["place"], none.outputs["place"])


def _export(
    stage: Callable[[str, Any], Callable[..., Any]],
    best: Any,
    given: Mapping[str, Any],
    settings: Settings,
) -> None:
    """Make of the final checkpoint what others can load, and do with that what was asked for.

    Args:
        stage: makes tasks.
        best: the checkpoint.
        given: the pipeline's parameters.
        settings: say whether it goes to the model registry.
    """
    with dsl.If(given["export"] == True, name="exporting"):  # noqa: E712 - kfp records the operator
        model = stage("export", export_hf)(
            checkpoint=best,
            license=given["export_license"],
            hf_secret_name=given["hf_secret_name"],
        ).outputs["exported"]
        with dsl.If(given["lm_eval_tasks"] != "", name="benchmarks"):
            stage("lm_eval", run_lm_eval)(
                model=model,
                tasks=given["lm_eval_tasks"],
                limit=given["lm_eval_limit"],
                seed=given["seed"],
                hf_secret_name=given["hf_secret_name"],
            )
        if settings.model_name:
            stage("register", register_model)(model=model, **settings.registry())


def task_maker(
    settings: Settings, backend: str, stages: Mapping[str, Stage]
) -> Callable[[str, Any], Callable[..., Any]]:
    """A function that makes tasks: a stage's component, on its machine, under its title."""
    image = settings.trainer_image or LOCAL_IMAGE

    def stage(key: str, component: Any) -> Callable[..., Any]:
        title, machine = stages[key].title, settings.machines[stages[key].machine_name]

        def task(**inputs: Any) -> Any:
            runnable = _with_image(component, image, backend)
            if backend == "vertex" and machine.gpu:
                runnable = _custom_job(runnable, stages[key], settings)
            created = runnable(**inputs).set_display_name(title)
            if backend == "local":
                again = 1 if stages[key].fans_out else 0
                return created.set_retry(num_retries=again, backoff_duration="0s")
            if backend == "kfp" or not machine.gpu:
                _request_machine(created, machine)
            return created.set_retry(
                num_retries=machine.retries,
                backoff_duration=f"{machine.backoff_seconds}s",
                backoff_factor=2.0,
                backoff_max_duration="3600s",
            )

        return task

    return stage


def _with_image(component: Any, image: str, backend: str) -> Any:
    """A copy that runs in the image, as its container's first process.

    Vertex AI sends SIGTERM to the first process alone. As kfp writes the command, that is a shell,
    which does not pass signals on, so a training would be killed before it saves. (On open-source
    Kubeflow Pipelines the launcher is the first process; a task that is started again goes on from
    its last periodic snapshot.) A first process ignores SIGTERM until it has a handler; blocked,
    the signal waits until the stage begins.
    """
    copied = copy.deepcopy(component)
    container = copied.component_spec.implementation.container
    container.image = image
    before = container.command
    container.command = [_SHELL_CALL.sub(r"export \1\nexec \2", piece) for piece in before]
    assert container.command != before, "this release of kfp writes its command in another way"
    if backend != "local":
        container.command = [*BLOCKING, *container.command]
        container.env = {STAGE_IMAGE: image}
    return copied


def _request_machine(task: Any, machine: Machine) -> None:
    task.set_cpu_limit(machine.cpu).set_memory_limit(machine.memory)
    if machine.gpu:
        # Kubernetes knows GPUs by the name of a resource, not by Vertex AI's names of their kinds
        resource = machine.accelerator_type if "/" in machine.accelerator_type else KUBERNETES_GPU
        task.set_accelerator_type(resource)
        task.set_accelerator_limit(machine.accelerator_count)
        task.set_env_variable(EXPECTED_GPUS, str(machine.accelerator_count))


def _custom_job(component: Any, stage: Stage, settings: Settings) -> Any:
    """A stage's component as a Vertex custom training job on as many machines as asked for."""
    from google_cloud_pipeline_components.v1.custom_job import (
        create_custom_training_job_from_component,
    )

    title, machine = stage.title, settings.machines[stage.machine_name]
    board = settings.tensorboard if stage.trains else ""
    # Of the stage, not of the run: a run's name would keep the task out of the cache
    output = f"{settings.pipeline_root.rstrip('/')}/tensorboard/{title}" if board else ""
    job = create_custom_training_job_from_component(
        component,
        display_name=title,
        replica_count=machine.replicas,
        machine_type=machine.machine_type,
        accelerator_type=machine.accelerator_type,
        accelerator_count=machine.accelerator_count,
        boot_disk_type=machine.disk_type or "unset",
        boot_disk_size_gb=machine.disk_gib,
        timeout=f"{machine.timeout_hours * 3600}s",
        restart_job_on_worker_restart=True,
        service_account=settings.service_account,
        tensorboard=board,
        base_output_directory=output,
        network=settings.network,
        encryption_spec_key_name=settings.cmek_key,
        labels=dict(settings.labels),
        strategy=SCHEDULING[machine.scheduling],
        max_wait_duration=f"{machine.max_wait_hours * 3600}s",
        env=[
            {"name": EXPECTED_GPUS, "value": str(machine.accelerator_count)},
            {"name": STAGE_IMAGE, "value": settings.trainer_image},
        ],
    )
    if not machine.disk_type:
        # The library names one type for all machines; the service knows what each one boots from
        for pool in job.component_spec.inputs["worker_pool_specs"].default:
            del pool["disk_spec"]["boot_disk_type"]
    return job
