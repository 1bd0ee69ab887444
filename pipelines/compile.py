"""Compile the pipeline to YAML.

python -m pipelines.compile [OUT.yaml] [vertex|kfp|local]
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from kfp import compiler

from pipelines.anneal import BACKENDS, build_pipeline
from pipelines.settings import Settings, load_settings
from trainer.config import run_command
from trainer.errors import UsageError


def compile_to(path: Path, settings: Settings, backend: str = "vertex") -> Path:
    """Write the compiled pipeline for a backend; returns the path.

    Raises:
        UsageError: an unknown backend.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiler.Compiler().compile(build_pipeline(settings, backend), package_path=str(path))
    return path


def main(argv: list[str]) -> None:
    """The command line."""
    logging.getLogger("kfp").setLevel(logging.ERROR)
    path = Path(argv[0] if argv else "build/pipeline.yaml")
    backend = argv[1] if len(argv) > 1 else "vertex"
    settings = load_settings()
    print(compile_to(path, settings, backend))
    if not settings.trainer_image:
        print("TRAINER_IMAGE is not set: the image named is a placeholder", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
