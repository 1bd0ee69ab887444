"""Write the final student as a stock Hugging Face model, for others to load."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export_hf(
    checkpoint: dsl.Input[dsl.Model],
    exported: dsl.Output[dsl.Model],
    license: str = "",
    hf_secret_name: str = "",
) -> int:
    """Weights, configurations, tokenizer and model card; returns the longest context."""
    from trainer.runtime.commands import start_stage

    start_stage()

    from components.lineage import Lineage
    from trainer import export_hf
    from trainer.checkpoints.metadata import summary
    from trainer.settings.layers import resolve
    from trainer.settings.values import given
    from trainer.storage.digests import digest_at
    from trainer.storage.places import place

    settings = resolve(given(hf_secret_name=hf_secret_name), {}).config
    output = place(exported.uri, exported.path)
    student = export_hf.run(
        place(checkpoint.uri, checkpoint.path),
        output,
        license=license or None,
        hub=settings,
        again=True,
    )
    exported.metadata.update(summary(student.source.meta))
    exported.metadata["architecture"] = type(student.model).__name__
    exported.metadata["positions"] = student.positions
    Lineage(checkpoint=student.source.digest).give(exported, digest_at(output))
    return student.positions
