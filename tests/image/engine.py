"""The container engine of this machine: docker where one answers, else podman."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten

from trainer.runtime.errors import LiquidError, UsageError
from trainer.runtime.messages import brief

ENGINES = ("docker", "podman")
USER = "12345:0"
"""Another user than the image's, in group 0, as OpenShift starts containers."""
HARDENED = (
    f"--user={USER}",
    "--read-only",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--security-opt=label=disable",
    "--tmpfs=/tmp:rw,mode=1777",
)
"""How each container runs: nothing can be written but ``/tmp`` and what is mounted."""
OF_PODMAN = ("--read-only-tmpfs=false", "--passwd=false")
"""Takes away what podman adds: more places to write, and an entry in /etc/passwd for the user."""
WRAPPER = Path(__file__).with_name("runc_without_limits.py")
PACKAGES = "apt-get install --no-install-recommends podman runc conmon netavark"
_SHELL = re.compile(r"^/bin/sh -c (#\(nop\) )?|\b(dir|file):[0-9a-f]+ in ")
"""What a layer's origin says beside the Dockerfile's own words."""
_OURS = f"liquid-image-test-{os.getpid()}-"
_numbers = itertools.count(1)


class Skipped(LiquidError):
    """What the test needs is not on this machine; the message says what to install."""

    exit_status = 77  # as in other test tools; 0 would look as if the image had been tested


@dataclass(frozen=True)
class Mount:
    """A directory or file of this machine in a container."""

    source: Path
    target: str
    writable: bool = False

    @property
    def option(self) -> str:
        """As engines take it after ``-v``."""
        return f"{self.source}:{self.target}{'' if self.writable else ':ro'}"


@dataclass(frozen=True)
class Engine:
    """An engine that answers."""

    name: str
    command: tuple[str, ...]
    """How it is called, with its options for all subcommands."""
    running: tuple[str, ...] = ()
    """Its own options of ``run``."""

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Call it and wait; its output is kept, its status is the caller's to look at."""
        return subprocess.run([*self.command, *arguments], capture_output=True, text=True)

    def must(self, *arguments: str) -> str:
        """Its output.

        Raises:
            LiquidError: it failed.
        """
        done = self.call(*arguments)
        if done.returncode:
            raise LiquidError(f"{self.name} {arguments[0]} failed: {last_line(done.stderr)}")
        return done.stdout

    def run_command(
        self,
        image: str,
        command: Sequence[str],
        *,
        name: str,
        network: str = "none",
        mounts: Sequence[Mount] = (),
        environment: Mapping[str, str] | None = None,
    ) -> list[str]:
        """What starts a hardened container in the foreground, in place of the image's entrypoint.

        Args:
            image: to run.
            command: its first process, with arguments.
            name: of the container, for `signal`.
            network: ``none``, or ``container:NAME`` for the network of another one.
            mounts: of this machine's files.
            environment: beside the image's own.
        """
        mounted = [f"--volume={mount.option}" for mount in mounts]
        variables = [f"--env={name}={value}" for name, value in (environment or {}).items()]
        first, *rest = command
        own = ["--rm", f"--name={name}", f"--network={network}", f"--entrypoint={first}"]
        every = [*self.running, *HARDENED, *own, *mounted, *variables]
        return [*self.command, "run", *every, image, *rest]

    def signal(self, container: str, signal: str) -> None:
        """Send a signal, as ``TERM``, to the first process of a container."""
        self.must("kill", f"--signal={signal}", container)

    def runs(self, container: str) -> bool:
        """Whether the first process of a container has been started, and has not ended."""
        return self.call("inspect", "--format={{.State.Running}}", container).stdout == "true\n"

    def end_containers(self) -> None:
        """Kill all containers that this process has started."""
        found = self.call("ps", "--quiet", f"--filter=name={_OURS}")
        if names := found.stdout.split():
            self.call("kill", *names)

    def size(self, image: str) -> int:
        """Bytes of an image."""
        return int(self.must("image", "inspect", "--format={{.Size}}", image))

    def layers(self, image: str) -> list[tuple[str, str]]:
        """Size and origin of each layer that holds anything, the last one first."""
        text = self.must("history", "--no-trunc", "--format={{.Size}}\t{{.CreatedBy}}", image)
        rows = [line.split("\t", 1) for line in text.splitlines() if "\t" in line]
        return [(size, shorten(_SHELL.sub("", made), 80)) for size, made in rows if size[0] != "0"]


def new_name() -> str:
    """A name for a container that no other has."""
    return f"{_OURS}{next(_numbers)}"


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def find_engine(wanted: str, store: Path | None) -> Engine:
    """The engine to use.

    Args:
        wanted: its name; empty: the first that answers.
        store: where podman keeps images; None: where it usually does.

    Raises:
        UsageError: an engine of another name.
        Skipped: none answers.
    """
    if wanted and wanted not in ENGINES:
        raise UsageError(f"ENGINE={brief(wanted)}: choose one of {', '.join(ENGINES)}")
    for name in [wanted] if wanted else ENGINES:
        own = ("--root", str(store)) if store and name == "podman" else ()
        engine = Engine(name, (name, *own), OF_PODMAN if name == "podman" else ())
        if store and name == "docker" and not wanted:
            continue
        if shutil.which(name) and engine.call("info").returncode == 0:
            return engine
    which = wanted or "neither docker nor podman"
    verb = "does not answer" if wanted else "answers"
    raise Skipped(f"{which} {verb}; start docker, or on Debian and Ubuntu: {PACKAGES}")


def that_runs(engine: Engine, image: str) -> Engine:
    """The engine with what it needs to run a container here.

    Some sandboxes do not let a runtime set the limits of a process; podman then takes runc with a
    wrapper that leaves them as they are.

    Raises:
        LiquidError: no container runs.
    """
    tried = [engine]
    if engine.name == "podman" and shutil.which("runc"):
        tried.append(replace(engine, running=(*engine.running, f"--runtime={WRAPPER}")))
    for one in tried:
        done = subprocess.run(
            one.run_command(image, ["true"], name=new_name()),
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return one
    raise LiquidError(f"{engine.name} runs no container: {last_line(done.stderr)}")


def version_of(engine: Engine) -> str:
    """Its name and release."""
    text = engine.must("version", "--format={{json .}}")
    client = json.loads(text).get("Client", {})
    return f"{engine.name} {client.get('Version', '')}".strip()
