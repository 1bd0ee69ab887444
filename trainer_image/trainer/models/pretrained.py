"""Which pretrained model is meant: its name, its revision, and where copies of it are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.storage.copies import DEFAULT_CACHE

Needed = Literal["tokenizer", "configuration", "weights"]
"""What of a model is asked for; the weights come with the rest."""


def described(needed: Needed, what: str) -> str:
    """How messages begin that go on with a model's name; ``what`` it is: teacher, student."""
    return "tokenizer of" if needed == "tokenizer" else what


@dataclass(frozen=True)
class Pretrained:
    """A model on the Hugging Face hub, in a local directory, or in a ``gs://`` directory.

    Attributes:
        name: as the user gives it.
        revision: on the hub a commit, tag or branch; of a ``gs://`` directory the digest that its
            files must have; None takes what is there.
        cache_dir: where files of a ``gs://`` directory are kept on this machine.
    """

    name: str
    revision: str | None = None
    cache_dir: str = DEFAULT_CACHE

    @classmethod
    def of(cls, model: str | Pretrained) -> Pretrained:
        """The model itself, or the one of a name."""
        return model if isinstance(model, Pretrained) else cls(model)


@dataclass(frozen=True)
class Located:
    """Where `transformers` finds a model.

    Attributes:
        path: a directory of this machine, or a name on the hub.
        revision: of the name on the hub; None for a directory.
        model: the model, with a revision that tells the version that was found.
    """

    path: str
    revision: str | None
    model: Pretrained

    @property
    def options(self) -> dict[str, str]:
        """What `transformers` is given beside the path."""
        return {} if self.revision is None else {"revision": self.revision}
