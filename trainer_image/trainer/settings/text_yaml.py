"""YAML whose scalars are text, as they stand in the file.

Left to guess types, YAML 1.1 reads ``0:0.7`` as a number of base 60, ``no`` as false and ``0123``
as 83. Settings know their own types.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from trainer.runtime.errors import StorageError, UsageError
from trainer.settings.secret_names import shown_name
from trainer.storage.files import read_regular

_LIMIT = 4 << 20
"""Bytes; a schedule with an entry for each of 200,000 updates is shorter."""

_NULL = ("", "~", "null", "Null", "NULL")

_TAGS = {
    "scalar": ("str", "int", "float", "bool", "null"),
    "sequence": ("seq",),
    "mapping": ("map",),
}


class _TextLoader(yaml.BaseLoader):
    """Text, lists and dicts; refuses what settings do not need: aliases and other types' tags.

    A few lines of aliases can stand for more than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed here", mark)
        node: Any = super().compose_node(parent, index)
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS[node.id]:
            problem = f"the tag {node.tag!r} is not allowed here"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        return None if node.style is None and node.value in _NULL else node.value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key) for key, _ in node.value]
        for index, name in enumerate(names):
            if name in names[:index]:
                mark = node.value[index][0].start_mark
                problem = f"{shown_name(str(name), ())!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, mark)
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
        text = read_regular(path, limit=_LIMIT).decode("utf-8")
        content = yaml.load(text, Loader=_TextLoader)  # noqa: S506 - constructs only text
    except (OSError, StorageError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} cannot be read: {error}") from None
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
