"""YAML whose scalars are text, as they stand in the file.

Left to guess types, YAML 1.1 reads ``0:0.7`` as a number of base 60, ``no`` as false and ``0123``
as 83. Settings know their own types.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainer.runtime.errors import StorageError, UsageError
from trainer.runtime.messages import brief
from trainer.settings.secret_names import shown_name
from trainer.storage.files import read_regular

_NULL = ("", "~", "null", "Null", "NULL")

_TAGS = {
    "scalar": ("str", "int", "float", "bool", "null"),
    "sequence": ("seq",),
    "mapping": ("map",),
}

_LARGEST = 2 << 20
"""Bytes of a file: schedules with an entry for each update have some hundred thousand."""
_MOST_VALUES, _DEEPEST = 10_000, 20
LONGEST = 4096
"""Characters of a value that is no schedule: those of Linux's longest path."""


class _TextLoader(yaml.BaseLoader):
    """Text, lists and dicts; refuses what settings do not need: aliases and other types' tags.

    A few lines of aliases can stand for more than any memory holds.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._values = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:
        self._values += 1
        self._depth += 1
        node = self._composed(parent, index)
        self._depth -= 1
        return node

    def _composed(self, parent: yaml.Node | None, index: int) -> Any:
        mark = self.peek_event().start_mark
        if self._depth > _DEEPEST:
            problem = f"it is nested more than {_DEEPEST} deep"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        if self._values > _MOST_VALUES:
            problem = f"it holds more than {_MOST_VALUES} names and values"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed here", mark)
        node: Any = super().compose_node(parent, index)
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS[node.id]:
            problem = f"the tag {brief(node.tag)} is not allowed here"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        return None if node.style is None and node.value in _NULL else node.value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str | None] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name = self.construct_scalar(key)
            if name in seen:
                problem = f"{brief(shown_name(str(name), ()))} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_settings(path: str | Path, name: str) -> dict[str, Any]:
    """The ``setting: value`` lines of a file; null values are None, an empty file is no setting.

    Args:
        path: the file.
        name: what messages call it.

    Raises:
        UsageError: the file cannot be read, is not YAML, names a setting twice, or holds something
            else than such lines.
    """
    try:
        text = read_regular(path, limit=_LARGEST).decode("utf-8")
        content = yaml.load(text, Loader=_TextLoader)  # noqa: S506 - constructs only text
    except (OSError, StorageError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{name} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UsageError(f"{name} is not valid YAML{where}: {problem}") from None
    except RecursionError:
        raise UsageError(f"{name} is nested too deeply") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{name} must hold 'setting: value' lines")
    return content
