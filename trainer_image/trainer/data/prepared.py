"""Token streams that are at an output already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.data.streams import (
    INFO_LIMIT,
    INFO_NAME,
    SOURCE,
    STREAMS,
    TokenInfo,
    cache_key,
    check_sizes,
    read_info,
)
from trainer.runtime.errors import DataError
from trainer.settings.config import TrainConfig
from trainer.storage.files import in_home
from trainer.storage.places import is_empty, open_location


def find_streams(output: str) -> TokenInfo | None:
    """The description of the token streams at an output; None where there are none yet.

    Raises:
        DataError: something else is there, or the streams are damaged.
    """
    if is_empty(output):
        return None
    if Path(in_home(output)).is_file():
        raise DataError(f"{output} is a file; give a new directory for the token streams")
    location = open_location(output)
    sizes = {entry.name: entry.size for entry in location.list()}
    if INFO_NAME in sizes:
        info = read_info(location.read_bytes(INFO_NAME, limit=INFO_LIMIT), output)
        check_sizes(info, sizes, output)
        return info
    if sizes.keys() <= set(STREAMS):
        return None  # what a killed attempt has left may be replaced
    raise DataError(f"{output} is not empty; give a new directory for the token streams")


def check_same(info: TokenInfo, config: TrainConfig, tokenizer: Any, output: str) -> None:
    """Refuse to take other token streams for those that are asked for.

    Raises:
        DataError: data set, settings or tokenizer differ, or cannot be told to be the same.
    """
    wanted = {
        "name": config.dataset_name,
        "config": config.dataset_config,
        "revision": config.dataset_revision,
        "text_column": config.text_column,
    }
    described = info.dataset if isinstance(info.dataset, dict) else {}
    held = {"tokenizer": info.tokenizer, **described}
    differing = [
        f"{name} {held.get(name)!r}, not {value!r}"
        for name, value in {"tokenizer": config.teacher, **wanted}.items()
        if held.get(name) != value
    ]
    if differing:
        raise DataError(
            f"{output} holds other token streams: {', '.join(differing)}; give a new directory"
        )
    if described.get(SOURCE) != cache_key(config, tokenizer):
        raise DataError(
            f"{output} holds token streams of {config.dataset_name} that cannot be told to be the"
            " same: its files or the tokenizer may have changed since; give a new directory"
        )
