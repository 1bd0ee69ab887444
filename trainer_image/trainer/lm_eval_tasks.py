"""Run tasks of lm-eval (the Language Model Evaluation Harness) on an exported student.

    python -m trainer.lm_eval_tasks EXPORTED_DIR OUT_DIR --tasks=lambada_openai,hellaswag

A path among the tasks is a YAML file of a task of your own. It needs
``pip install 'liquid-annealing[lm-eval]'``, and for most tasks the Hugging Face hub.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import difflib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.models.exported import exported_student
from trainer.models.hugging_face import load_tokenizer, locate
from trainer.models.teacher import read_teacher_spec
from trainer.runtime.commands import run_command
from trainer.runtime.errors import DataError, LiquidError, ModelError, UsageError
from trainer.runtime.log import log, quiet_libraries, set_up_logging
from trainer.runtime.strict_json import dumps
from trainer.settings.config import AUTO, LM_EVAL_SETTINGS, LmEvalSettings, TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.hf_token import ENVIRONMENT_NAMES, find_hf_token
from trainer.settings.layers import resolve
from trainer.storage.files import in_home
from trainer.storage.places import check_output
from trainer.storage.publish import publishing
from trainer.training.precision import choose_precision

RESULTS, TABLE = "lm_eval.json", "lm_eval.md"
_YAML = (".yaml", ".yml")
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better")
"""Of what lm-eval returns; the rest describes the machine."""
_RESAMPLES = 1000
"""For the standard errors of metrics that are no means."""
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def run(
    exported: str, output: str, settings: LmEvalSettings, config: TrainConfig
) -> dict[str, float]:
    """Run tasks; writes ``lm_eval.json`` (results and versions) and ``lm_eval.md`` (a table).

    Args:
        exported: a directory of `trainer.export_hf`, local or ``gs://``.
        output: a local directory or ``gs://`` prefix; results that are there are replaced.
        settings: which tasks, and how much of them.
        config: ``seed``, ``micro_batch``, precision, work and cache directory, Hugging Face token.

    Returns:
        Every metric that is a number, by ``{task} {metric}``.

    Raises:
        UsageError: lm-eval is not installed, or does not know a task.
        ModelError: the student cannot be loaded.
        DataError: a task's data cannot be had.
    """
    if not settings.tasks:
        raise UsageError("there is no task; give --tasks, for example lambada_openai")
    check_output(output)
    harness = _harness()
    token = find_hf_token(config)
    if token is not None:
        os.environ[ENVIRONMENT_NAMES[0]] = token  # where the libraries below look
    student = exported_student(exported, config.cache_dir)
    if student is None:
        raise ModelError(f"{exported} is no exported student; give a directory of export_hf")
    spec = read_teacher_spec(student, what="student")
    student = spec.model or student
    load_tokenizer(student)
    manager, tasks = _tasks(settings.tasks)
    precision = choose_precision(config)
    directory = locate(student, "weights", "student").path
    with _readable_errors(settings.tasks):
        found = harness.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": directory,
                "dtype": str(precision.compute).removeprefix("torch."),
                "max_length": spec.max_context,
            },
            tasks=tasks,
            device=str(precision.device),
            # AUTO is 0, of which lm-eval would make one batch of everything there is
            batch_size="auto" if config.micro_batch == AUTO else config.micro_batch,
            limit=settings.limit or None,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=_RESAMPLES,
            **dict.fromkeys(_SEEDS, config.seed % 2**32),
        )
    _write(found, output, harness, Path(config.local_workdir))
    return numbers(found["results"])


def _harness() -> Any:
    try:
        import lm_eval
        from lm_eval.models import huggingface  # noqa: F401 - what `hf` needs
    except ImportError as error:
        raise UsageError(
            f"lm-eval cannot be used here ({error}): pip install 'liquid-annealing[lm-eval]'; the"
            " trainer image leaves it out, docs/pipeline.md says how to add it"
        ) from None
    return lm_eval


def _tasks(names: Sequence[str]) -> tuple[Any, list[Any]]:
    """What lm-eval knows of tasks, and those named, paths as their contents.

    Raises:
        UsageError: a task that it does not know, or a file that describes none.
    """
    from lm_eval.tasks import TaskManager

    # Its own are thousands of files, which take a while to look through
    own = all(name.endswith(_YAML) for name in names)
    manager = TaskManager(include_defaults=not own)
    tasks: list[Any] = []
    for name in names:
        path = in_home(name)
        if name.endswith(_YAML):
            tasks.append(_own_task(name, Path(path)))
        elif name in manager.all_tasks:
            tasks.append(name)
        else:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"--tasks: lm-eval has no task {name!r}; {hint}See lm-eval ls tasks")
    return manager, tasks


def _own_task(name: str, path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--tasks: {name} cannot be read: {reason}") from None
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise UsageError(f"--tasks: {name} describes no task of lm-eval: it has no 'task: NAME'")
    return content


@contextmanager
def _readable_errors(names: Sequence[str]) -> Iterator[None]:
    """Raise a `DataError` of one line where a task cannot be loaded or run."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except LiquidError:
        raise
    except (
        OSError,
        DatasetsError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
    ) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise DataError(
            f"lm-eval could not run {', '.join(names)}: {type(error).__name__}: {reason[:500]};"
            " most tasks take their data from the Hugging Face hub, so check the network and the"
            " token"
        ) from error


def numbers(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Every finite number of lm-eval's results by ``{task} {metric}``, filters left out if none."""
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "_stderr" not in metric and "," in metric
        if math.isfinite(value)
    }


def _write(found: dict[str, Any], output: str, harness: Any, workdir: Path) -> None:
    from lm_eval.utils import make_table

    kept = {name: found[name] for name in _KEPT if name in found}
    kept |= {"samples": found.get("n-samples"), "lm_eval": getattr(harness, "__version__", None)}
    with publishing(output, last=TABLE, workdir=workdir, replacing=True) as directory:
        (directory / RESULTS).write_text(dumps(kept, indent=2), encoding="utf-8")
        (directory / TABLE).write_text(f"{make_table(found)}\n", encoding="utf-8")


FLAGS = ["seed", "micro_batch", "bf16", "fp16", "fp32", "local_workdir", "cache_dir"]
FLAGS += ["hf_token_value", "hf_token_file", "hf_token_gcs_uri", "hf_secret_name"]


def main(argv: list[str]) -> None:
    """The command line; prints the table."""
    flags = [*LM_EVAL_SETTINGS, *FLAGS]
    parser = build_parser("python -m trainer.lm_eval_tasks", str(__doc__), only=flags)
    parser.add_argument("exported", metavar="EXPORTED_DIR", help="of trainer.export_hf, or gs://")
    parser.add_argument("output", metavar="OUT_DIR", help="a directory or gs:// URI")
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    given = settings_from_args(args)
    own = {name: given.pop(name) for name in LM_EVAL_SETTINGS if name in given}
    found = run(args.exported, args.output, LmEvalSettings(**own), resolve(given, {}).config)
    for name, value in found.items():
        print(f"{name} {value:.4f}")
    log.info("%d metrics written to %s", len(found), args.output)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
