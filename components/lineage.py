"""What the metadata of every artifact says of where it came from.

``digest`` is the artifact's own, ``input NAME`` the digest of each input that it was made of, so
that a chain of artifacts can be followed from the exported student to the tokens. ``code``,
``commit`` and ``image`` say what made it, as far as that is known. Digests are written as in
`trainer.storage.digests`.
"""

from __future__ import annotations

from kfp import dsl

from trainer.runtime.provenance import running_code
from trainer.storage.digests import digest_of_file

DIGEST = "digest"
INPUT = "input "


class Lineage:
    """Where the outputs of a stage come from.

    Args:
        inputs: by name an artifact, whose metadata has its digest, or a digest. What is None or
            empty, or an artifact of an earlier release, is left out.
    """

    def __init__(self, **inputs: dsl.Artifact | str | None) -> None:
        code = running_code()
        made_by = {"code": code["version"], "commit": code["commit"], "image": code["image"]}
        digests = {INPUT + name.replace("_", " "): _digest(value) for name, value in inputs.items()}
        self.metadata = {name: text for name, text in (digests | made_by).items() if text}

    def give(self, artifact: dsl.Artifact, digest: str | None = None) -> None:
        """Put it into an artifact's metadata.

        Args:
            artifact: an output.
            digest: its own, empty where it is not known; None is that of the file at its path,
                which is read.
        """
        digest = digest_of_file(artifact.path) if digest is None else digest
        artifact.metadata.update(self.metadata | ({DIGEST: digest} if digest else {}))

    def give_each(self, *artifacts: dsl.Artifact) -> None:
        """Put it into the metadata of outputs that are files at their paths."""
        for artifact in artifacts:
            self.give(artifact)


def _digest(source: dsl.Artifact | str | None) -> str:
    if source is None or isinstance(source, str):
        return source or ""
    return str(source.metadata.get(DIGEST, ""))
