"""Rank the trials of a search, and say what the winner is worth."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def rank_trials(
    outcomes: list,
    metric: str,
    parameters: dict,
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    ranking: dsl.Output[dsl.Artifact],
    winner: dsl.Output[dsl.Artifact],
    before: dsl.Input[dsl.Artifact] = None,
) -> NamedTuple("Ranked", [("params", str)]):  # type: ignore[valid-type]
    """The trials' curves over one another, the ranking as a table and as JSON, and the winner.

    That is given as ``PARAMS`` of the whole pipeline, which are returned too.
    """
    from trainer.runtime.commands import start_stage

    start_stage()

    import tempfile
    from pathlib import Path

    from components.lineage import Lineage
    from trainer import compare
    from trainer.runtime.strict_json import dumps
    from trainer.search.ranking import ranked
    from trainer.search.report import Findings
    from trainer.search.trials import Outcome, outcomes_at

    texts = [*outcomes_at(before and before.path), *outcomes]
    findings = Findings(ranked([Outcome.parse(text) for text in texts]), metric, parameters)
    report.uri, table.uri = f"{report.uri}.html", f"{table.uri}.md"
    ranking.uri, winner.uri = f"{ranking.uri}.json", f"{winner.uri}.txt"
    page = "<!DOCTYPE html>\n<title>One trial</title>\n<p>One trial came to the end.</p>"
    if len(findings.places) > 1:
        with tempfile.TemporaryDirectory() as scratch:
            compare.run(findings.places, scratch)
            page = Path(scratch, compare.HTML).read_text(encoding="utf-8")
    Path(report.path).write_text(page, encoding="utf-8")
    Path(table.path).write_text(findings.markdown(), encoding="utf-8")
    Path(winner.path).write_text(findings.winning_parameters)
    content = {"metric": metric, "groups": findings.rows(), "said": findings.sentences()}
    Path(ranking.path).write_text(dumps(content, indent=2))
    Lineage(before=before).give_each(report, table, ranking, winner)
    return (findings.winning_parameters,)
