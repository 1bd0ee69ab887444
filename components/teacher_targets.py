"""Run the teacher over one worker's share of the token stream and keep its targets."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def teacher_targets(
    tokens: dsl.Input[dsl.Dataset],
    teacher_name: str,
    share: str,
    eval_ctx_lens: str,
    targets: dsl.Output[dsl.Dataset],
    teacher_revision: str = "",
    hf_secret_name: str = "",
) -> NamedTuple("Made", [("place", str)]):  # type: ignore[valid-type]
    """Shards and where they lie; started again, it goes on behind its last whole one.

    ``share`` holds its settings, as `components.plan_targets` writes them.
    """
    from trainer.runtime.commands import start_stage

    start_stage()

    import json

    from components.lineage import Lineage
    from trainer import teacher_targets
    from trainer.settings.config import TargetSettings
    from trainer.settings.layers import resolve
    from trainer.settings.values import given, parse_value
    from trainer.storage.places import place, shared_place
    from trainer.targets.shards import read_share

    output = shared_place(targets.uri, targets.path)
    settings = {
        "tokens_dir": place(tokens.uri, tokens.path),
        "teacher_name": teacher_name,
        "teacher_revision": teacher_revision,
        "eval_ctx_lens": eval_ctx_lens,
        "hf_secret_name": hf_secret_name,
    }
    own = TargetSettings(
        **{name: parse_value(name, value) for name, value in json.loads(share).items()}
    )
    teacher_targets.run(resolve(given(**settings), {}).config, own, output)
    there = read_share(output)
    teacher = there.made.teacher_digest if there.made else None
    Lineage(tokens=tokens, teacher=teacher).give(targets, there.digest)
    return (output,)
