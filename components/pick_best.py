"""Pick the best checkpoint of a run; reads sidecars, never weights."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def pick_best(
    checkpoints: dsl.Input[dsl.Model],
    best: dsl.Output[dsl.Model],
    metric: str = "val_loss_student",
) -> NamedTuple("Picked", [("loss", float), ("step", int)]):  # type: ignore[valid-type]
    """The checkpoint of the lowest metric, where it lies; ties go to the earlier step."""
    from trainer.runtime.commands import start_stage

    start_stage()

    from components.lineage import Lineage
    from trainer import pick_best
    from trainer.checkpoints.metadata import summary
    from trainer.storage.places import place

    metric = metric or "val_loss_student"
    picked = pick_best.run([place(checkpoints.uri, checkpoints.path)], metric)
    name = picked.uri.rpartition("/")[2]
    best.uri = f"{checkpoints.uri}/{name}"
    best.metadata.update(summary(picked.meta) | {"metric": metric, "value": picked.value})
    Lineage(checkpoints=picked.among).give(best, picked.digest)
    return (picked.value, picked.step)
