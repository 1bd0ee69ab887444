"""The command line: one flag for each setting."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from trainer.runtime.errors import UsageError
from trainer.settings.config import SETTINGS
from trainer.settings.values import TYPES, parse_value

_SECRET_FLAGS = tuple(f"--{name}" for name, spec in SETTINGS.items() if spec.metadata["secret"])


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors in one line that shows no value of a secret."""

    def __init__(self, prog: str, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, **options)

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError` where argparse prints its usage and exits."""
        raise UsageError(f"{message} (see --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but an unknown flag is named without its value."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return parsed
        first = unknown[0].partition("=")[0]
        if not first.startswith("-"):
            secret = any(word.startswith(_SECRET_FLAGS) for word in args or ())
            self.error(f"unexpected argument {'***' if secret else repr(first)}")
        flags = [text for action in self._actions for text in action.option_strings]
        near = difflib.get_close_matches(first, flags, 1)
        return self.error(f"unknown flag {first}{f'; did you mean {near[0]}?' if near else ''}")


def build_parser(
    prog: str, description: str, *, only: Iterable[str] | None = None
) -> argparse.ArgumentParser:
    """A parser with one flag per setting (``only`` those named), defaults left out.

    A flag that is not given is absent from the namespace, so that the layers can be told apart.
    """
    parser = OneLineParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for name in SETTINGS if only is None else only:
        spec = SETTINGS[name]
        default = spec.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        suffix = "" if default in (None, "", ()) or default is False else f" [{shown}]"
        choices = spec.metadata["choices"]
        options: dict[str, Any] = {"metavar": "|".join(choices) if choices else _metavar(name)}
        if TYPES[name] is bool:
            options = {"metavar": "BOOL", "nargs": "?", "const": "true"}
        elif name == "betas":
            options = {"metavar": "BETA", "nargs": "+"}
        text = (spec.metadata["help"] + suffix).replace("%", "%%")
        parser.add_argument(f"--{name}", help=text, **options)
    return parser


def _metavar(name: str) -> str:
    if name == "micro_batch":
        return "N|auto"
    kind = str(TYPES[name])
    return "N" if "int" in kind else "X" if "float" in kind else "TEXT"


def settings_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave, parsed."""
    return {
        name: parse_value(name, value) for name, value in vars(args).items() if name in SETTINGS
    }
