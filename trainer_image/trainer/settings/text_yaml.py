"""YAML whose scalars are text, as they stand in the file.

Left to guess types, YAML 1.1 reads ``0:0.7`` as a number of base 60, ``no`` as false and ``0123``
as 83. Settings know their own types.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trainer.runtime.errors import UsageError

_NULL = ("", "~", "null", "Null", "NULL")


class _TextLoader(yaml.BaseLoader):
    """Constructs text, lists and dicts, and refuses every other tag, and aliases.

    Settings need none, and a few lines of them can stand for more than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As the base class does, where there is no alias."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed here", mark)
        return super().compose_node(parent, index)


def _mapping(loader: _TextLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    names = [loader.construct_object(key) for key, _ in node.value]
    for index, name in enumerate(names):
        if name in names[:index]:
            mark = node.value[index][0].start_mark
            raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", mark)
    return loader.construct_mapping(node, deep=True)


def _scalar(loader: _TextLoader, node: yaml.ScalarNode) -> str | None:
    plain = node.style is None
    return None if plain and node.value in _NULL else str(loader.construct_scalar(node))


def _sequence(loader: _TextLoader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _refuse(loader: _TextLoader, tag: str, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(
        None, None, f"the tag {node.tag!r} is not allowed here", node.start_mark
    )


_CONSTRUCTORS: dict[str, Callable[[Any, Any], Any]] = {
    "map": _mapping,
    "seq": _sequence,
    **dict.fromkeys(("str", "int", "float", "bool", "null"), _scalar),
}

for _kind, _constructor in _CONSTRUCTORS.items():
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _constructor)

_TextLoader.add_multi_constructor("", _refuse)


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
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=_TextLoader)  # noqa: S506 - constructs only text
    except (OSError, UnicodeDecodeError) as error:
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
