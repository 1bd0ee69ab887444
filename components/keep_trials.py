"""Let the better part of a rung's trials go on."""

from typing import List  # noqa: UP035 - kfp tells what a loop goes over by this name

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def keep_trials(
    outcomes: list,
    keep: float,
    standings: dsl.Output[dsl.Artifact],
    before: dsl.Input[dsl.Artifact] = None,
) -> List[str]:  # noqa: UP006
    """The trials that go on; the outcomes of this rung and those before are kept for the ranking.

    All seeds of a setting go on together, and the best control does too.
    """
    from trainer.runtime.commands import start_stage

    start_stage()

    from pathlib import Path

    from components.lineage import Lineage
    from trainer.runtime.log import log
    from trainer.runtime.strict_json import dumps
    from trainer.search.ranking import going_on, labels, ranked
    from trainer.search.trials import Outcome, outcomes_at

    standings.uri = f"{standings.uri}.json"
    Path(standings.path).write_text(dumps([*outcomes_at(before and before.path), *outcomes]))
    Lineage(before=before).give(standings)
    groups = ranked([Outcome.parse(text) for text in outcomes])
    kept = going_on(groups, keep)
    names = labels(groups)
    for group in groups:
        words = "goes on" if group in kept else "ends here"
        log.info("%s: %.4f at step %d, %s", names[group.name], group.mean, group.step, words)
    return [one.trial.dump() for group in kept for one in group.outcomes]
