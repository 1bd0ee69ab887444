"""Make a checkpoint ready for a longer context: positions stretched, the rest reset."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def resize_reset(
    checkpoint: dsl.Input[dsl.Model],
    block_size: int,
    resized: dsl.Output[dsl.Model],
    pos_resize: str = "linear",
) -> int:
    """Weights for ``block_size`` positions without optimizer, at step 0; returns the old step."""
    from trainer.runtime.commands import start_stage

    start_stage()

    from components.lineage import Lineage
    from trainer import resize_reset
    from trainer.checkpoints.metadata import origin_digest, summary
    from trainer.checkpoints.sidecar import read_sidecar
    from trainer.settings.layers import resolve
    from trainer.settings.values import given
    from trainer.storage.places import place

    settings = resolve(given(block_size=block_size, pos_resize=pos_resize), {}).config
    resized.uri = f"{resized.uri}.pt"
    output = place(resized.uri, resized.path)
    meta = resize_reset.run(
        place(checkpoint.uri, checkpoint.path),
        output,
        settings.context,
        method=settings.pos_resize,
    )
    resized.metadata.update(summary(meta) | {"from_step": meta["origin"]["step"]})
    Lineage(checkpoint=origin_digest(meta)).give(resized, read_sidecar(output).digest)
    return int(meta["origin"]["step"])
