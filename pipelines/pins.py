"""Which version of a teacher or a data set in a bucket a run is about.

A task whose inputs are as before is taken from the cache, and the name of a bucket's directory is
the same when its files have changed. So the digest of the files is an input too: it is looked up
where a run is submitted, and each stage refuses files that have another one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from trainer.data.remote_data import pinned
from trainer.models.pretrained import Pretrained
from trainer.models.remote_models import revision_of
from trainer.runtime.errors import LiquidError
from trainer.settings.config import TrainConfig
from trainer.storage.places import is_remote

_PINNED: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "teacher_name": ("teacher_revision", lambda name: revision_of(Pretrained(name))),
    "dataset_name": (
        "dataset_revision",
        lambda name: pinned(TrainConfig(dataset_name=name)).dataset_revision,
    ),
}
"""By the parameter that names a place, the one of its revision, and what looks it up."""


def with_revisions(parameters: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Parameters with the revision of each place that they name without one.

    Of what is in no bucket that is empty, so that a repeated run does not keep the revision of what
    it was about before.

    Args:
        parameters: those given.
        known: names of the parameters that the pipeline has.

    Raises:
        LiquidError: a bucket's directory cannot be listed, or is no teacher or data set.
    """
    found = dict(parameters)
    for name, (revision, look_up) in _PINNED.items():
        place = found.get(name)
        if place is None or found.get(revision) or revision not in known:
            continue
        try:
            found[revision] = look_up(place) if is_remote(place) else ""
        except LiquidError as error:
            raise type(error)(f"PARAMS: {name}: {error}") from None
    return found
