"""Which version of a teacher or a data set a run is about.

A task whose inputs are as before is taken from the cache, and a name is the same when what it names
has changed. So the version is an input too, looked up where a run is submitted: of a bucket's
directory the digest of its files, which each stage compares with what it finds, and of what is on
the Hugging Face hub the commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from trainer.data.remote_data import pinned
from trainer.models.pretrained import Pretrained
from trainer.models.remote_models import revision_of
from trainer.runtime.errors import LiquidError
from trainer.runtime.log import log
from trainer.settings.config import TrainConfig
from trainer.storage.places import is_remote

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _Named:
    """What a parameter names."""

    what: str
    revision: str
    """The parameter of its revision."""
    kind: Any
    """What the hub calls it."""
    digest: Callable[[str], str | None]
    """Of a bucket's directory."""


_PINNED = {
    "teacher_name": _Named(
        "teacher", "teacher_revision", "model", lambda place: revision_of(Pretrained(place))
    ),
    "dataset_name": _Named(
        "data set",
        "dataset_revision",
        "dataset",
        lambda place: pinned(TrainConfig(dataset_name=place)).dataset_revision,
    ),
}


def with_revisions(
    parameters: Mapping[str, Any],
    known: Collection[str],
    *,
    hub: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Parameters with the revision of each place that they name without one.

    What the hub does not tell is logged and left empty. So is what is neither in a bucket nor, with
    ``hub``, there, so that a repeated run does not keep the revision of what it was about before.

    Args:
        parameters: those given.
        known: names of the parameters that the pipeline has.
        hub: whether to ask the hub for the commits of what is on it.
        defaults: what stands for names that are not given; None leaves these alone.

    Raises:
        LiquidError: a bucket's directory cannot be listed, or is no teacher or data set.
    """
    found = dict(parameters)
    for name, named in _PINNED.items():
        place = found.get(name, (defaults or {}).get(name))
        if place is None or found.get(named.revision) or named.revision not in known:
            continue
        try:
            revision = named.digest(place) if is_remote(place) else ""
        except LiquidError as error:
            raise type(error)(f"PARAMS: {name}: {error}") from None
        if hub and not revision:
            revision = _commit(named, place)
        if revision or name in found:
            found[named.revision] = revision
    return found


def _commit(named: _Named, name: str) -> str:
    """The commit that a name on the hub stands for now; empty where that is not known."""
    from pipelines.checks.hub import HubSilentError, ask_hub, on_hub

    if not name or not on_hub(name):
        return ""
    try:
        commit = str(ask_hub(named.kind, name).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        reason = "it is not there, or not open to your token"
    except HubSilentError as error:
        reason = str(error)
    else:
        if _COMMIT.fullmatch(commit):
            log.info("%s %s is pinned to commit %s of the hub", named.what, name, commit[:12])
            return commit
        reason = "the hub names no commit"
    log.info(
        "%s %s is not pinned, and the cache takes it for unchanged: %s; %s in PARAMS pins it",
        named.what,
        name,
        reason,
        named.revision,
    )
    return ""


def check_places(parameters: Mapping[str, Any], known: Collection[str]) -> None:
    """Look at the places that a schedule's runs will look at, and say that none is pinned.

    Each of its runs takes the teacher and the data set as they are then: that is what it is run
    again for.

    Args:
        parameters: those given.
        known: names of the parameters that the pipeline has.

    Raises:
        LiquidError: as `with_revisions`.
    """
    with_revisions(parameters, known)
    free = [named.revision for named in _PINNED.values() if not parameters.get(named.revision)]
    if free:
        log.info(
            "not pinned: each run takes teacher and data set as they are then (%s in PARAMS pins);"
            " the cache knows them by name, so CACHE=0 is for those that change",
            ", ".join(free),
        )
