#!/usr/bin/env python3
"""runc, but the limits of a container's processes are left as they are.

A sandbox that may not raise them lets no container start otherwise. podman calls this with the
arguments of runc.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def leave_limits(bundle: Path) -> None:
    """Take the limits out of a bundle's configuration."""
    config = bundle / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    content["process"].pop("rlimits", None)
    config.write_text(json.dumps(content), encoding="utf-8")


def bundle_of(arguments: list[str]) -> Path | None:
    """The bundle that runc's arguments name."""
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument in ("--bundle", "-b"):
            return Path(after)
        if argument.startswith("--bundle="):
            return Path(argument.partition("=")[2])
    return None


if __name__ == "__main__":
    given = sys.argv[1:]
    if found := bundle_of(given):
        leave_limits(found)
    os.execvp("runc", ["runc", *given])
