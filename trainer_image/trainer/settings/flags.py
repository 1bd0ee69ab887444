"""The command line: one flag for each setting."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from trainer.runtime.errors import UsageError
from trainer.runtime.log import without_secrets
from trainer.runtime.near_names import near_name
from trainer.settings.config import SETTINGS
from trainer.settings.secret_names import resembles_secret, shown_name
from trainer.settings.values import SPECS, TYPES, parse_value

_SECRET_FLAGS = tuple(f"--{name}" for name, spec in SETTINGS.items() if spec.metadata["secret"])

_FLAG = re.compile(r"-+[^\W\d]")
"""How a flag begins, where a negative number does not."""


_ASSIGNMENT = re.compile("[\u2010-\u2015\u2212'\"]{0,4}(\\w[\\w-]*)([=:])")
"""Also behind the long dashes into which an editor turns two short ones."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, with errors in one line that shows no value of a secret."""

    def __init__(self, prog: str, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError` where argparse prints its usage and exits."""
        raise UsageError(without_secrets(f"{message} (see --help)"))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but what is wrong is named without its value."""
        words = list(sys.argv[1:] if args is None else args)
        flags = [text for action in self._actions for text in action.option_strings]
        before_end = itertools.takewhile(lambda word: word != "--", words)
        for word in before_end:
            # argparse takes -hf_token_value=… for -h, and shows the rest
            if _FLAG.match(word) and word.partition("=")[0] not in flags:
                self._unknown(word.partition("=")[0], flags)
        taking = {text for a in self._actions if a.nargs is None for text in a.option_strings}
        for before, word in itertools.pairwise(["", *words]):
            assignment = _ASSIGNMENT.match(word)
            if assignment and before not in taking:
                self._check_no_assignment(assignment[1], assignment[2])
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            secret = any(word.startswith(_SECRET_FLAGS) for word in words)
            self.error(f"unexpected argument {'***' if secret else repr(unknown[0])}")
        return parsed

    def _check_no_assignment(self, name: str, sign: str) -> None:
        """Refuse ``token=…`` where a flag was meant; as a path it would be shown."""
        if resembles_secret(name):
            self.error(f"unexpected argument {shown_name(name, SETTINGS)}{sign}***")

    def _unknown(self, name: str, flags: list[str]) -> NoReturn:
        near = near_name(name, flags)
        hint = f"; did you mean {near}?" if near else ""
        self.error(f"unknown flag {shown_name(name, flags)}{hint}")


def build_parser(
    prog: str, description: str, *, only: Iterable[str] | None = None
) -> argparse.ArgumentParser:
    """A parser with one flag per setting (``only`` those named), defaults left out.

    A flag that is not given is absent from the namespace, so that the layers can be told apart.
    """
    parser = OneLineParser(
        prog=prog,
        description=description,
        argument_default=argparse.SUPPRESS,
    )
    for name in SETTINGS if only is None else only:
        spec = SPECS[name]
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
    return {name: parse_value(name, value) for name, value in vars(args).items() if name in SPECS}
