"""Join the shards of all workers to the targets that trainings read."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def join_targets(
    places: list,
    targets: dsl.Output[dsl.Dataset],
) -> NamedTuple("Joined", [("place", str)]):  # type: ignore[valid-type]
    """An index of shards, sizes, checksums and what they were made with; returns where it lies.

    Places go from task to task as texts: an artifact would be copied to the machine of every task
    that takes it on open-source Kubeflow Pipelines.
    """
    from trainer.runtime.commands import start_stage

    start_stage()

    from components.lineage import Lineage
    from trainer import teacher_targets
    from trainer.storage.digests import as_sha256
    from trainer.storage.places import shared_place

    output = shared_place(targets.uri, targets.path)
    index = teacher_targets.join_places(output, places)
    made = index.made
    shares = {f"share {number}": digest for number, digest in enumerate(index.shares, start=1)}
    lineage = Lineage(tokens=as_sha256(made.tokens), teacher=made.teacher_digest, **shares)
    lineage.give(targets, as_sha256(index.fingerprint))
    return (output,)
