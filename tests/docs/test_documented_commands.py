"""Every command of the documentation: it can be given like that, and it runs.

The world of `adapted` is a bucket of an object server, a tiny teacher, a tiny corpus, and loopback
servers in place of Google Cloud. All commands run in it, in the order of the pages, once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import submit
from pipelines.anneal import build_pipeline
from pipelines.compile import Build
from pipelines.local import DEMO
from pipelines.make_variables import wrong_variable
from pipelines.parameters import check_parameters, parse_parameters
from pipelines.settings import Settings
from tests.conftest import log_as_it_was
from tests.docs.adapted import DRY, ELSEWHERE, adapted, reason_elsewhere
from tests.docs.markdown import (
    COMMANDS,
    PAGES,
    ROOT,
    Command,
    blocks,
    command,
    prose,
    sentences,
    spans,
)
from tests.faults.server import ObjectServer
from tests.pipelines.google_services import GoogleServices
from tests.pipelines.test_submit import PARENT, finished_run, run
from tests.trainer.samples import base_package_payload
from trainer.runtime.errors import UsageError
from trainer.settings.config import (
    LM_EVAL_SETTINGS,
    SAMPLE_SETTINGS,
    SETTINGS,
    TARGET_SETTINGS,
    LmEvalSettings,
    SampleSettings,
    TargetSettings,
)
from trainer.settings.flags import OneLineParser, settings_from_args
from trainer.settings.layers import resolve
from trainer.storage.places import open_location

pytestmark = pytest.mark.timeout(900)  # of all commands together, on a busy machine

MAKEFILE = (ROOT / "Makefile").read_text()
BENCH = " ".join(path.read_text() for path in (ROOT / "bench").glob("*.py"))
OTHER_TABLES: list[tuple[Any, Any]] = [
    (TargetSettings, TARGET_SETTINGS),
    (SampleSettings, SAMPLE_SETTINGS),
    (LmEvalSettings, LM_EVAL_SETTINGS),
]
RUN_HERE = [found for found in COMMANDS if reason_elsewhere(found) is None]
Key = tuple[tuple[tuple[str, str], ...], tuple[str, ...]]
DONE = "done"


def named(found: Command) -> str:
    return found.name


# ── how a command is given


class ParsedError(Exception):
    """Ends a command once its flags are parsed."""


def parsed(module: str, argv: list[str]) -> Any:
    """What a command's own parser makes of its arguments."""
    kept: list[Any] = []
    parse = OneLineParser.parse_args

    def and_end(self: OneLineParser, args: Any = None, namespace: Any = None) -> Any:
        kept.append(parse(self, args, namespace))
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ParsedError):
        patch.setattr(OneLineParser, "parse_args", and_end)
        importlib.import_module(module).main(argv)
    return kept[0]


def check_module(module: str, argv: list[str]) -> None:
    """Its parser takes the arguments, and every value is one that its setting can have."""
    if argv == ["--help"]:
        assert (ROOT / "trainer_image" / f"{module.replace('.', '/')}.py").exists()
        return
    given = settings_from_args(parsed(module, argv))
    for table, names in OTHER_TABLES:
        own = {name: value for name, value in given.items() if name in names}
        if own:
            table(**own)
    resolve({name: value for name, value in given.items() if name in SETTINGS}, {})


def check_make(found: Command) -> None:
    """The target exists, it reads the variables, and the pipeline has the parameters."""
    goals = [word for word in found.words[1:] if "=" not in word]
    given = dict(word.partition("=")[::2] for word in found.words[1:] if "=" in word)
    for goal in goals:
        assert re.search(rf"^{goal}:", MAKEFILE, re.MULTILINE), goal
    assert not wrong_variable(goals, given)
    if "PARAMS" in given:
        defaults = DEMO if goals == ["run-local"] else {}
        check_parameters(defaults | parse_parameters(given["PARAMS"]))


def check_given(found: Command) -> None:
    words = list(found.words)
    if words[0] == "make":
        check_make(found)
    elif "trainer." in " ".join(words) and "-m" in words:
        at = words.index("-m") + 1
        check_module(words[at], words[at + 1 :])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif scripts := [word for word in words if word.startswith("bench/")]:
        assert (ROOT / scripts[0]).exists()
        behind = words[words.index(scripts[0]) :]
        assert all(f'"{word}"' in BENCH for word in behind if word.startswith("--"))
    else:
        assert reason_elsewhere(found), f"tests/docs/adapted.py does not know {words[0]}"


@pytest.mark.parametrize("found", COMMANDS, ids=named)
def test_a_command_can_be_given_like_that(found: Command) -> None:
    check_given(found)


@pytest.mark.parametrize(
    "line",
    [
        "make run-loca",
        "make submit-pipeline PARAM=seed=7",
        "make run-local STAGE=continue",
        "make submit-pipeline PARAMS='train_steps=7'",
        "make submit-pipeline PARAMS='anneal_alpha=2'",
        "python -m trainer.entrypoint --train_step=5",
        "python -m trainer.entrypoint --alpha=2",
        "python -m trainer.sample exported --greedy=true --top_k=5",
        "python -m trainer.evaluate",
        "python bench/gpu_step.py --no_such_flag",
        "wget https://example.com",
    ],
)
def test_a_wrong_command_is_found_out(line: str) -> None:
    with pytest.raises((AssertionError, UsageError)):
        check_given(command(PAGES[0], 0, shlex.split(line)))


def in_prose() -> list[Command]:
    """Commands that stand within sentences, but for what has a place to be filled in."""
    found = [
        command(page, 0, shlex.split(text))
        for page in PAGES
        for text in spans(sentences(page))
        if re.match(r"(make|python -m) [a-z]", text) and "…" not in text and "NAME" not in text
    ]
    return list({(one.page, one.words): one for one in found}.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_can_be_given(page: Path) -> None:
    for found in in_prose():
        if found.page == page:
            check_given(found)


def test_flags_within_sentences_exist() -> None:
    """A flag that was renamed must not live on in a sentence."""
    known = {"help", *SETTINGS, *(name for _, names in OTHER_TABLES for name in names)}
    doors = (ROOT / "trainer_image" / "trainer").glob("*.py")
    own = " ".join(path.read_text() for path in doors)
    for page in PAGES:
        for text in (span for span in spans(sentences(page)) if not span.startswith("gcloud")):
            for name in re.findall(r"(?<![\w-])--([a-zA-Z]\w*)", text):
                there = name in known or f'"--{name}"' in own + BENCH or f'"{name}":' in own
                assert there, f"{page.relative_to(ROOT)}: --{name}"


def test_nothing_is_said_to_run_elsewhere_that_the_pages_do_not_have() -> None:
    used = {reason_elsewhere(found) for found in COMMANDS}
    assert used - {None} == set(ELSEWHERE)


# ── how it runs


class World:
    """Where the commands run; knows what came of each."""

    def __init__(self, directory: Path, bucket: str, teacher: Path, corpus: Path) -> None:
        self.directory = directory
        self.bucket = bucket
        self.places = {
            "BUCKET": bucket,
            "TEACHER": str(teacher),
            "CORPUS": str(corpus),
            "SCRATCH": str(directory),
        }
        self.environment: dict[str, str] = {}
        """Of the commands of make."""
        self.services: dict[str, str] = {}
        """Of the checks before a submission, beside it."""
        self.outcomes: dict[Key, str] = {}
        """What several pages have runs once."""

    def fill(self) -> None:
        """What the documents take for granted: a checkpoint, copies in the bucket, files here."""
        payload = base_package_payload(trained=32, rows=256, vocabulary=512, width=32)
        buffer = io.BytesIO()
        torch.save(payload, buffer)
        self.put("base/ckpt_step_68150.pt", buffer.getvalue())
        for name in ("models/gpt2-xl", "my_teacher"):
            self.put_all(name, Path(self.places["TEACHER"]))
        for name in ("data/wikitext-103", "my_text"):
            self.put_all(name, Path(self.places["CORPUS"]))
        for block in (block for page in PAGES for block in blocks(page)):
            if block.language == "yaml":
                name = "grid.yaml" if block.page.name == "search.md" else "pipeline.yaml"
                text = block.text.replace("DIGEST", "0" * 64).replace("gs://BUCKET", self.bucket)
                assert not (self.directory / name).exists()
                (self.directory / name).write_text(text)
        settings = (self.directory / "pipeline.yaml").read_text().splitlines()
        kept = [line for line in settings if line.startswith(("PIPELINE_ROOT", "TRAINER_IMAGE"))]
        (self.directory / "kubeflow.yaml").write_text("\n".join(kept))

    def put(self, name: str, data: bytes) -> None:
        prefix, _, last = name.rpartition("/")
        open_location(f"{self.bucket}/{prefix}").put_bytes(data, last)

    def put_all(self, prefix: str, directory: Path) -> None:
        for path in directory.iterdir():
            self.put(f"{prefix}/{path.name}", path.read_bytes())

    def run(self, found: Command) -> str:
        """`DONE`, or how it failed."""
        words = list(found.words)
        try:
            with log_as_it_was(), contextlib.chdir(self.directory):
                if words[0] == "make":
                    self._make(found)
                else:
                    assert words[:2] == ["python", "-m"]
                    self._trainer(words[2], words[3:], dict(found.environment))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - told by the command's own test
            return f"{type(error).__name__}: {error}"
        return DONE

    def _trainer(self, module: str, argv: list[str], environment: dict[str, str]) -> None:
        argv = adapted(module, argv, self.places)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(module).main(argv)

    def _make(self, found: Command) -> None:
        (goal,) = [word for word in found.words[1:] if "=" not in word]
        given = dict(word.partition("=")[::2] for word in found.words[1:] if "=" in word)
        recipe = re.search(
            rf"^{goal}:.*\n\t@\$\(BIN\)/python -m pipelines\.(\S+)(.*)$", MAKEFILE, re.MULTILINE
        )
        assert recipe, f"make {goal} is no command of the pipeline; see tests/docs/adapted.py"
        argv = recipe[2].replace("$(BACKEND)", given.get("BACKEND", "")).split()
        settings = given.get("SETTINGS", "pipeline.yaml")
        given |= {"SETTINGS": str(self.directory / settings)}
        if "GRID" in given and not given["GRID"].startswith("examples/"):
            given["GRID"] = str(self.directory / given["GRID"])
        if goal in DRY:
            given["DRY_RUN"] = "1"
        environment = self.environment | (self.services if goal == "preflight" else {})
        given = {name: value.replace("gs://BUCKET", self.bucket) for name, value in given.items()}
        done = run(recipe[1], environment | given, *argv)
        assert done.returncode == 0, done.stderr or done.stdout


def key_of(found: Command) -> Key:
    """The same for commands that are the same here, where nothing is sent and waited for."""
    words = (word for word in found.words if word not in ("DRY_RUN=1", "WAIT=1"))
    return found.environment, tuple(words)


def in_order() -> list[Command]:
    """What trains comes first, since other pages go on from it."""
    first = ROOT / "docs" / "training.md"
    return sorted(RUN_HERE, key=lambda found: found.page != first)


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("my_text")
    for name, part in (("train", texts[:2]), ("validation", texts[-1:])):
        lines = (json.dumps({"text": text[:3000]}) for text in part)
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    return directory


def compiled_once() -> Callable[..., Path]:
    """`compile_to`, which takes a second, but for a pipeline that it has seen.

    What differs are machines then: these are checked, and tests/pipelines/test_compile.py compiles
    them.
    """
    compile_to, seen = submit.compile_to, dict[str, str]()

    def compile_or_copy(path: Path, settings: Settings, backend: str, build: Build) -> Path:
        if build is not build_pipeline or backend not in seen:
            written = compile_to(path, settings, backend, build)
            if build is build_pipeline:
                seen[backend] = written.read_text()
            return written
        if backend == "vertex":
            settings.check_vertex()
        path.write_text(seen[backend])
        return path

    return compile_or_copy


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    object_server: ObjectServer,
    teacher_dir: Path,
    small_corpus: Path,
) -> World:
    """All commands have run in it."""
    object_server.make_bucket("bucket-of-the-docs")
    directory = tmp_path_factory.mktemp("world")
    services = GoogleServices(tmp_path_factory.mktemp("services"))
    world = World(directory, "gs://bucket-of-the-docs", teacher_dir, small_corpus)
    world.environment = {
        "API_ENDPOINT": f"localhost:{services.port}",
        "API_TRANSPORT": "rest",
        "GOOGLE_APPLICATION_CREDENTIALS": str(services.service_account(directory / "key.json")),
        "REQUESTS_CA_BUNDLE": str(services.bundle),
        "STORAGE_EMULATOR_HOST": object_server.url,
        "PREFLIGHT": "0",
    }
    hub = GoogleServices(tmp_path_factory.mktemp("hub"), tls=False)
    world.services = services.overrides() | {"HF_ENDPOINT": hub.url}
    level, threads = logging.getLogger().level, torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other in models as small as these
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", object_server.url)
        patch.setattr(submit, "compile_to", compiled_once())
        world.fill()
        repeated_run(services, world)
        for found in in_order():
            if key_of(found) not in world.outcomes:
                world.outcomes[key_of(found)] = world.run(found)
    logging.getLogger().setLevel(level)
    torch.set_num_threads(threads)
    services.close()
    hub.close()
    return world


def repeated_run(services: GoogleServices, world: World) -> None:
    """The finished run that the documents repeat."""
    project = {"SETTINGS": str(world.directory / "pipeline.yaml")}
    finished_run(services, world.environment | project)
    (job,) = services.jobs.values()
    name = job["name"].replace(PARENT, "projects/my-project/locations/europe-west4/pipelineJobs")
    services.jobs = {name: job | {"name": name}}


@pytest.mark.parametrize("found", RUN_HERE, ids=named)
def test_a_command_runs(world: World, found: Command) -> None:
    assert world.outcomes[key_of(found)] == DONE


def test_the_estimate_of_the_readme() -> None:
    time = r"(\d+) h (\d+) min"
    told = re.search(f"for the defaults some {time}", prose(ROOT / "README.md"))
    estimated = re.search(f"total: {time}", run("estimate", {}).stdout)
    assert told is not None
    assert estimated is not None
    told_minutes, minutes = (60 * int(found[1]) + int(found[2]) for found in (told, estimated))
    assert told_minutes == pytest.approx(minutes, rel=0.1)
