"""Which code is running: its version, its commit, and the image that it came in."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import trainer

CODE_COMMIT = "CODE_COMMIT"
"""Variable of an image: the commit that it was built from."""
STAGE_IMAGE = "STAGE_IMAGE"
"""Variable of a stage's container: the image, as it was named at submission."""

_GIT_SECONDS = 10.0


def running_code() -> dict[str, str | None]:
    """Version, commit and image; None for each that nothing tells."""
    commit = os.environ.get(CODE_COMMIT) or commit_of(Path(trainer.__file__).parent)
    image = os.environ.get(STAGE_IMAGE) or None
    return {"version": trainer.__version__, "commit": commit, "image": image}


@cache
def commit_of(package: Path) -> str | None:
    """The commit of the checkout that a package lies in; None where it is in none.

    It ends with ``-dirty`` where files of the checkout have been changed since.
    """
    outputs = []
    for command in (
        ("ls-files", "--error-unmatch", "__init__.py"),
        ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
    ):
        try:
            ran = subprocess.run(
                ["git", "-C", str(package), *command],
                capture_output=True,
                text=True,
                timeout=_GIT_SECONDS,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        outputs.append(ran.stdout.strip())
    return outputs[-1]
