"""Say what the teacher's targets must serve, and share the work out."""

from typing import List  # noqa: UP035 - kfp tells what a loop goes over by this name

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan_targets(
    target_workers: int,
    target_bytes: int,
    anneal_block_size: int,
    anneal_temperature: float,
    anneal_temp_schedule: str,
    continue_block_size: int,
    continue_temperature: float,
    continue_temp_schedule: str,
) -> List[str]:  # noqa: UP006
    """For each worker its settings, as JSON: the context and temperatures of both trainings.

    What costs depends on these alone, so another schedule of the same temperatures repeats nothing.
    """
    from trainer.runtime.commands import start_stage

    start_stage()

    from trainer.settings.config import TrainConfig
    from trainer.targets.shares import shares_of

    temperatures: set[float] = set()
    for initial, text in (
        (anneal_temperature, anneal_temp_schedule),
        (continue_temperature, continue_temp_schedule),
    ):
        temperatures.update(TrainConfig(T=initial, temp_schedule=text).schedule_T.values())
    return shares_of(
        context=max(anneal_block_size, continue_block_size),
        temperatures=temperatures,
        target_bytes=target_bytes,
        workers=target_workers,
    )
