"""Builds the trainer image from the unchanged Dockerfile, with wheels for the CPU or the full lock.

The wheels are changed where the Dockerfile gets them from: the build's context is a copy, whose
lock leaves out what torch's build for the CPU does not ask for. What pip is configured with on this
machine (indexes, certificates) holds in the build too, where the engine can mount it.
"""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.image.engine import Engine, Mount, Skipped, last_line
from trainer.runtime.errors import LiquidError, UsageError
from trainer.runtime.messages import brief

ROOT = Path(__file__).parents[2]
DOCKERFILE = "trainer_image/Dockerfile"
LOCK = "trainer_image/requirements.lock"
CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")
"""What torch's build for the CPU does not ask for."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEBOOTSTRAP, SUITE = "debootstrap", "bookworm"
_PIP_PATHS = ("constraint", "find-links", "index-url", "extra-index-url")
_PIP_FILES = ("cert", "client-cert")
_PIP_VALUES = ("trusted-host", "proxy", "timeout", "default-timeout", "retries")
_PIP_CONFIGURATION = "/etc/pip.conf"


@dataclass(frozen=True)
class Recipe:
    """What to build."""

    full: bool
    """With the whole lock, so with CUDA's libraries; else with wheels for the CPU."""
    cpu_index: str
    """An index that has torch's wheel for the CPU; empty: those that pip knows have it."""
    base: str
    """What stands in for the Dockerfile's base: ``debootstrap``, an archive of a root file system,
    or empty for the base itself."""
    mirror: str
    """Where debootstrap gets packages from; empty is its own choice."""

    @property
    def tag(self) -> str:
        """The name of the image."""
        return f"localhost/liquid-annealing-trainer:{'full' if self.full else 'cpu'}"

    def check(self, engine: Engine) -> None:
        """Refuse what cannot work, before anything is built.

        Raises:
            UsageError: a base that is neither, or an engine that would keep it for other builds.
            Skipped: debootstrap is missing, or may not work for this user.
        """
        if not self.base:
            return
        if engine.name == "docker":
            raise UsageError(
                "BASE: docker would keep the stand-in under the base's name, for other builds too;"
                " give ENGINE=podman, or leave BASE out"
            )
        if self.base != DEBOOTSTRAP:
            if not Path(self.base).is_file():
                raise UsageError(
                    f"BASE={brief(self.base)}: give debootstrap, or an archive of a root file"
                    " system"
                )
        elif shutil.which(DEBOOTSTRAP) is None:
            raise Skipped("BASE=debootstrap: apt-get install debootstrap")
        elif os.getuid() != 0:
            raise Skipped("BASE=debootstrap: debootstrap makes a root file system only as root")


def base_image() -> str:
    """The name of the Dockerfile's base, with its registry."""
    found = re.search(r"^FROM (\S+)", (ROOT / DOCKERFILE).read_text(), re.MULTILINE)
    assert found
    return f"docker.io/{found[1]}"


def cpu_lock(text: str, index: str) -> str:
    """The lock for a machine without a GPU.

    Args:
        text: the lock.
        index: that has torch's wheel for the CPU; empty for none.
    """
    lines = [line for line in text.splitlines() if not CUDA.match(line)]
    return "\n".join([*([f"--extra-index-url {index}"] if index else []), *lines, ""])


def make_context(recipe: Recipe, directory: Path) -> None:
    """Copy what the Dockerfile copies, and itself, to an empty directory."""
    dockerfile = (ROOT / DOCKERFILE).read_text()
    for source in re.findall(r"^COPY (?!--from)(\S+) ", dockerfile, re.MULTILINE):
        target = directory / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
            )
        else:
            shutil.copy2(ROOT / source, target)
    for name in (DOCKERFILE, ".dockerignore"):
        shutil.copy2(ROOT / name, directory / name)
    if not recipe.full:
        lock = directory / LOCK
        lock.write_text(cpu_lock(lock.read_text(encoding="utf-8"), recipe.cpu_index))


def pip_mounts(configuration: str, directory: Path) -> list[Mount]:
    """Mounts that give a build pip's configuration of this machine.

    Args:
        configuration: as ``pip config list`` prints it.
        directory: for the file that they mount.
    """
    given: dict[str, str] = {}
    for line in configuration.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", "install", ":env:"):  # in the order of their precedence
            given[key] = str(ast.literal_eval(value))
    mounts, kept = [], {}
    for key, value in given.items():
        if key in _PIP_VALUES:
            kept[key] = value
        elif key in _PIP_PATHS:
            kept[key] = value
            paths = [Path(word.removeprefix("file://")) for word in value.split()]
            mounts += [
                Mount(_top(p), str(_top(p))) for p in paths if p.is_absolute() and p.exists()
            ]
        elif key in _PIP_FILES:
            # Not at its own place, where the system's packages write in the build
            kept[key] = f"/etc/pip-{key}.pem"
            mounts.append(Mount(Path(value).resolve(), kept[key]))
    if not kept:
        return []
    content = configparser.RawConfigParser()
    content["global"] = kept
    file = directory / "pip.conf"
    with file.open("w", encoding="utf-8") as writing:
        content.write(writing)
    return [Mount(file, _PIP_CONFIGURATION), *dict.fromkeys(mounts)]


def _top(path: Path) -> Path:
    """An index's own directory beside those of its files, which its pages lead to."""
    return path.parent if path.name == "simple" else path


def import_base(engine: Engine, recipe: Recipe, work: Path) -> None:
    """Put the stand-in under the name of the Dockerfile's base; kept once it is there.

    Raises:
        LiquidError: it cannot be made or imported.
    """
    name = base_image()
    if engine.call("image", "exists", name).returncode == 0:
        return
    if recipe.base != DEBOOTSTRAP:
        engine.must("import", recipe.base, name)
        return
    with tempfile.TemporaryDirectory(dir=work, prefix="base-") as scratch:
        made = Path(scratch, "root")
        command = [
            DEBOOTSTRAP,
            "--variant=minbase",
            SUITE,
            str(made),
            *filter(None, [recipe.mirror]),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LiquidError(f"debootstrap failed: {last_line(done.stdout + done.stderr)}")
        archive = Path(scratch, "base.tar")
        subprocess.run(["tar", "-C", str(made), "-cf", str(archive), "."], check=True)
        engine.must("import", str(archive), name)


def build(engine: Engine, recipe: Recipe, work: Path) -> Path:
    """Build the image; returns the log.

    Args:
        engine: that builds it.
        recipe: what to build.
        work: for the log and the context.

    Raises:
        LiquidError: a step failed.
    """
    log = work / "build.log"
    with tempfile.TemporaryDirectory(dir=work, prefix="context-") as scratch:
        context = Path(scratch, "context")
        context.mkdir()
        make_context(recipe, context)
        own: list[str] = []
        if engine.name == "podman":
            configured = [sys.executable, "-m", "pip", "config", "list"]
            listed = subprocess.run(configured, capture_output=True, text=True).stdout
            # Without its own namespaces, which a sandbox may not give
            own = ["--isolation=chroot", "--network=host", "--layers"]
            own += ["--pull=never"] if recipe.base else []
            own += [f"--volume={mount.option}" for mount in pip_mounts(listed, Path(scratch))]
        command = ["build", *own, f"--file={context / DOCKERFILE}", f"--tag={recipe.tag}"]
        with log.open("w", encoding="utf-8") as writing:
            done = subprocess.run(
                [*engine.command, *command, str(context)], stdout=writing, stderr=subprocess.STDOUT
            )
    if done.returncode:
        said = last_line(log.read_text(encoding="utf-8", errors="replace"))
        raise LiquidError(f"the image cannot be built: {said} (all output: {log})")
    return log
