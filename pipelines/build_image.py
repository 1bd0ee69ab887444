"""Build the trainer image for Google's machines, push it, and print its name with the digest.

    make build-image TRAINER_IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/trainer:1

With Cloud Build, or here with ``BUILDER=docker``; ``DRY_RUN=1`` prints the commands.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from pipelines.settings import Settings, load_settings
from pipelines.submit import switch
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError, UsageError
from trainer.runtime.log import set_up_logging
from trainer.runtime.provenance import CODE_COMMIT, commit_of
from trainer.settings.flags import OneLineParser

ROOT = Path(__file__).parent.parent
BUILDERS = ("cloud", "docker")


def commands(settings: Settings, builder: str) -> list[list[str]]:
    """What is run from the repository's root, in this order; the last one prints the digest.

    Raises:
        UsageError: no image, one named by digest, or an unknown builder.
    """
    image = settings.require("trainer_image").trainer_image
    if "@" in image:
        raise UsageError(
            f"TRAINER_IMAGE={image!r}: a digest is what building gives; name a tag, such as"
            f" {image.partition('@')[0]}:1"
        )
    if builder not in BUILDERS:
        raise UsageError(f"BUILDER={builder!r}: choose one of {', '.join(BUILDERS)}")
    commit = commit_of(ROOT / "trainer_image" / "trainer") or ""
    if builder == "docker":
        build = ["docker", "build", "--platform", "linux/amd64"]
        build += ["--build-arg", f"{CODE_COMMIT}={commit}"]
        build += ["-f", "trainer_image/Dockerfile", "-t", image, "."]
        shown = ["docker", "inspect", "--format", "{{index .RepoDigests 0}}", image]
        return [build, ["docker", "push", image], shown]
    project = ["--project", settings.project] if settings.project else []
    build = ["gcloud", "builds", "submit", "--config", "trainer_image/cloudbuild.yaml"]
    build += ["--substitutions", f"_IMAGE={image},_COMMIT={commit}", *project, "."]
    shown = ["gcloud", "artifacts", "docker", "images", "describe", image, *project]
    return [build, [*shown, "--format", "value(image_summary.fully_qualified_digest)"]]


def main(argv: list[str]) -> None:
    """The command line; everything comes from the environment and the settings file.

    Raises:
        UsageError: see `commands`.
        LiquidError: a command is not installed, or fails.
    """
    set_up_logging()
    OneLineParser("python -m pipelines.build_image", description=__doc__).parse_args(argv)
    lines = commands(load_settings(), os.environ.get("BUILDER") or "cloud")
    if switch("DRY_RUN"):
        print("\n".join(shlex.join(line) for line in lines))
        return
    tool = lines[0][0]
    if shutil.which(tool) is None:
        other = "give BUILDER=docker" if tool == "gcloud" else "leave BUILDER out for Cloud Build"
        raise LiquidError(f"{tool} is not installed here; install it, or {other}")
    for line in lines:
        status = subprocess.run(line, cwd=ROOT, check=False).returncode
        if status:
            raise LiquidError(f"{shlex.join(line)} ended with status {status}; see above")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
