"""What an installation holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[2]


def test_every_directory_with_code_is_packaged() -> None:
    """A package that is not found would be missing from an installation and from the image."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    find = setuptools["packages"]["find"]
    packaged = {
        name
        for where in find["where"]
        for name in find_packages(str(ROOT / where), (), find["include"])
    }
    code = {
        ".".join(path.parent.relative_to(base).parts)
        for base, top in (
            (ROOT / "trainer_image", "trainer"),
            (ROOT, "components"),
            (ROOT, "pipelines"),
        )
        for path in (base / top).rglob("*.py")
    }
    assert packaged == code
    assert {"trainer", "trainer.models", "trainer.models.gpt2"} <= code


def test_every_data_file_is_packaged() -> None:
    """What code reads beside itself would be missing from an installation."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package).glob(pattern)
    }
    files = {path for path in (ROOT / "pipelines").rglob("*") if path.is_file()}
    assert named == {path for path in files if path.suffix not in (".py", ".pyc")}
    assert named
