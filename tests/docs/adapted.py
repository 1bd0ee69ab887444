"""How the commands of the documentation become ones that run here, in seconds, without a cloud.

Tables say it: `PLACES` for what is named, `CONTEXTS` and `UPDATES` for what is too large,
`APPENDED` for what makes it small, and `ELSEWHERE` for what is not run by these tests. A command
that none of them knows fails.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tests.docs.markdown import Command

ELSEWHERE: dict[tuple[str, ...], str] = {
    (
        "make",
        "run-local",
    ): "it takes minutes; tests/pipelines/test_anneal.py runs the pipeline",
    ("make", "test"): "it is what runs this test",
    ("make", "image-test"): "it takes minutes and an engine of containers",
    ("apt-get", "install"): "it installs what only make image-test needs",
    ("pip", "install"): "it installs; .ci/run and the image do",
    ("gcloud",): "it needs a Google Cloud project",
    ("deploy/google_cloud.sh",): "tests/deploy/test_google_cloud.py runs it",
    ("hf", "download"): "it fetches gigabytes from the hub",
    ("torchrun", "--nnodes=2"): "it needs two machines; the flags of the training are parsed",
    ("python", "-m", "trainer.lm_eval_tasks"): "lm-eval is an extra; its flags are parsed, and"
    " tests/trainer/test_lm_eval_tasks.py runs it where it is installed",
    ("python", "-m", "pytest"): "it needs a GPU",
    ("python", "bench"): "it needs a GPU or takes minutes; its flags are looked for in the script",
    ("torchrun", "--nproc-per-node=gpu"): "it needs several GPUs",
}
"""By the words that a command starts with: why it is not run here."""

PLACES = {
    "gpt2-xl": "TEACHER",
    "wikitext": "CORPUS",
    "my_teacher": "TEACHER",
    "my_text": "CORPUS",
}
"""By the whole value of a flag: which of the world's places stands for it."""

DROPPED = ("dataset_config",)
"""Flags that the data set here has no use for."""

CONTEXTS = ("block_size", "eval_ctx_lens")
SHORTER = 16
"""Contexts are a sixteenth: gpt2-xl's 1,024 positions are the 64 of the teacher here."""

UPDATES = ("train_steps", "stop_at", "warmup_steps")
FEWER = 600
"""Of so many updates one is left."""

APPENDED = {
    "trainer.entrypoint": {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "eval_every": 2,
        "save_every": 2,
        "log_interval": 1,
        "eval_max_tokens": 600,
    },
    "trainer.evaluate": {"eval_max_tokens": 600},
}
"""By module: flags that make a run small, behind those of the document."""

NO_PLACES = ("trainer.report", "trainer.compare", "trainer.pick_best", "trainer.resize_reset")
"""Modules that keep no downloads, so that `CACHED` are not theirs."""

DRY = ("submit-pipeline", "submit-kfp", "rerun", "search", "build-image", "schedule")
"""Commands of make that get ``DRY_RUN=1``: all is compiled and checked, nothing is sent."""


def reason_elsewhere(command: Command) -> tuple[str, ...] | None:
    """The entry of `ELSEWHERE` that a command is under."""
    for words in ELSEWHERE:
        if command.starts_with(*words):
            return words
    if command.words[0] == "python" and command.words[1].startswith("bench/"):
        return ("python", "bench")
    return None


def adapted(module: str, argv: Sequence[str], places: dict[str, str]) -> list[str]:
    """The arguments of a command of the trainer as they are run.

    Args:
        module: that the arguments are for.
        argv: as the document has them.
        places: ``TEACHER``, ``CORPUS``, ``BUCKET`` and ``SCRATCH`` of this machine.
    """
    found = []
    for word in argv:
        name, sign, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in DROPPED:
            continue
        if word.startswith("--") and sign:
            word = f"--{name}={_value(name, value, places)}"
        found.append(word.replace("gs://BUCKET", places["BUCKET"]))
    added = dict(APPENDED.get(module, {}))
    added["local_workdir"] = f"{places['SCRATCH']}/work"
    if module not in NO_PLACES:
        added["cache_dir"] = f"{places['SCRATCH']}/cache"
    if module == "trainer.pick_best":
        added = {}
    return found + [f"--{name}={value}" for name, value in added.items()]


def _value(name: str, value: str, places: dict[str, str]) -> str:
    if value in PLACES:
        return places[PLACES[value]]
    if name in CONTEXTS:
        return ",".join(str(int(number) // SHORTER) for number in value.split(","))
    if name in UPDATES:
        return str(-(-int(value) // FEWER))
    return re.sub(r"@(\d+)", lambda found: f"@{int(found[1]) // SHORTER}", value)
