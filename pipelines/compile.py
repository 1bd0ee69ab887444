"""Compile the pipeline to YAML, with the image and machines of the settings."""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler

from pipelines.anneal import BACKENDS, build_pipeline
from pipelines.settings import Settings, load_settings, settings_file
from trainer.runtime.commands import run_command
from trainer.runtime.errors import UsageError
from trainer.runtime.log import set_up_logging
from trainer.settings.flags import OneLineParser

Build = Callable[[Settings, str], Any]
"""Makes a pipeline of settings and backend."""


def compile_to(
    path: Path, settings: Settings, backend: str = "vertex", build: Build = build_pipeline
) -> Path:
    """Write the compiled pipeline for a backend; returns the path.

    Args:
        path: to write.
        settings: image and machines.
        backend: see `pipelines.anneal.build_pipeline`.
        build: makes the pipeline of settings and backend.

    Raises:
        UsageError: an unknown backend, or no YAML file's path.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if path.suffix != ".yaml" or (path.exists() and not path.is_file()):
        raise UsageError(f"{str(path)!r}: give a path that ends with .yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiler.Compiler().compile(build(settings, backend), package_path=str(path))
    return path


def main(argv: list[str]) -> None:
    """The command line."""
    set_up_logging()
    logging.getLogger("kfp").setLevel(logging.ERROR)
    parser = OneLineParser("python -m pipelines.compile", description=__doc__)
    parser.add_argument("path", type=Path, nargs="?", default=Path("build/pipeline.yaml"))
    parser.add_argument("backend", choices=BACKENDS, nargs="?", default="vertex")
    args = parser.parse_args(argv)
    settings = load_settings()
    if args.path.resolve() == settings_file().resolve():
        raise UsageError(f"{str(args.path)!r} is where the settings are read from; give another")
    print(compile_to(args.path, settings, args.backend))
    if not settings.trainer_image:
        print("TRAINER_IMAGE is not set: the image named is a placeholder", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
