"""A report on one training: its phases, their losses beside the teacher's, what to know of them.

    python -m trainer.report RUN [RUN …] --output=DIR [--evaluation=METRICS] [--samples=FILE]

A RUN is the output location of a training. Several are the phases of one training, in the order in
which they were trained; `trainer.compare` sets runs against each other. ``report.html`` is one file
without scripts that needs no network; ``report.md`` says the same in text.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

from collections.abc import Sequence
from pathlib import Path

from trainer.metrics.evaluated import read_rows
from trainer.reports.contents import Report, build_report, short_lines
from trainer.reports.rendering import markdown, page
from trainer.reports.runs import Run
from trainer.reports.samples import read_samples
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError
from trainer.runtime.log import log, set_up_logging
from trainer.settings.config import DEFAULT_WORKDIR
from trainer.settings.flags import build_parser
from trainer.storage.places import check_output
from trainer.storage.publish import publishing

HTML, MARKDOWN = "report.html", "report.md"


def run(
    runs: Sequence[str],
    output: str,
    *,
    evaluation: str = "",
    samples: str = "",
    workdir: str = DEFAULT_WORKDIR,
) -> list[str]:
    """Write ``report.html`` and ``report.md`` on the phases of one training.

    Args:
        runs: their output locations, in the order in which they were trained.
        output: a local directory or ``gs://`` prefix; reports that are there are replaced.
        evaluation: output of `trainer.evaluate` or its ``metrics.json``; empty where there is none.
        samples: JSON file of texts; empty where there are none.
        workdir: scratch space for what is uploaded.

    Returns:
        The result in a few lines of text.

    Raises:
        UsageError: the samples are none, or a URI is malformed.
        MetricsError: there is no record of a run, no evaluation, or they are damaged.
        StorageError: something cannot be read or written.
    """
    check_output(output)
    found = [Run.read(location) for location in runs]
    rows = read_rows(evaluation) if evaluation else []
    report = build_report(found, rows, read_samples(samples) if samples else [])
    with publishing(output, last=HTML, workdir=Path(workdir), replacing=True) as directory:
        (directory / MARKDOWN).write_text(as_markdown(report), encoding="utf-8")
        (directory / HTML).write_text(as_page(report), encoding="utf-8")
    return short_lines(found, rows)


def write_stage_report(
    locations: Sequence[str], html: str, *, text: str = "", evaluation: str = ""
) -> None:
    """Write the report of a pipeline's stage; a failure to do so is told there, and is no other's.

    Days of training must not be lost to a plot, nor to a record that an older release did not
    write.

    Args:
        locations: of the runs' records, in the order in which they were trained.
        html: path of the page.
        text: path of the Markdown; empty: none is written.
        evaluation: as for `run`.
    """
    found, problems = _readable(locations)
    try:
        rows = read_rows(evaluation) if evaluation else []
        report = build_report(found, rows, problems=problems)
        page_text, markdown_text = as_page(report), as_markdown(report)
    except Exception as error:  # noqa: BLE001 - whatever it is, the stage has done its work
        log.warning("no report: %s: %s", type(error).__name__, error)
        told = f"The report could not be made: {type(error).__name__}: {error}"
        report = build_report([], problems=[told])
        page_text, markdown_text = as_page(report), as_markdown(report)
    Path(html).write_text(page_text, encoding="utf-8")
    if text:
        Path(text).write_text(markdown_text, encoding="utf-8")


def _readable(locations: Sequence[str]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and sentences on the others."""
    found, problems = [], []
    for location in locations:
        try:
            found.append(Run.read(location))
        except LiquidError as error:
            problems.append(f"A run is left out: {error}.")
            log.warning("the report leaves a run out: %s", error)
    return found, problems


def stage_lines(locations: Sequence[str], evaluation: str) -> list[str]:
    """What `write_stage_report` says, in a few lines for a terminal.

    Raises:
        MetricsError: there is no evaluation there.
        StorageError: it cannot be read.
    """
    found, problems = _readable(locations)
    return [*short_lines(found, read_rows(evaluation)), *(f"note: {text}" for text in problems)]


def as_page(report: Report) -> str:
    """The report as one HTML page."""
    return page("report.html.j2", title=report.title, report=report)


def as_markdown(report: Report) -> str:
    """The report as Markdown, without the plots."""
    return markdown("report.md.j2", report=report)


def main(argv: list[str]) -> None:
    """The command line; prints the result in a few lines."""
    parser = build_parser("python -m trainer.report", str(__doc__), only=("local_workdir",))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output of a training, or gs:// URI")
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory or gs:// URI")
    parser.add_argument(
        "--evaluation", default="", metavar="DIR", help="what trainer.evaluate has written"
    )
    parser.add_argument(
        "--samples", default="", metavar="FILE", help="JSON: prompt, student's and teacher's text"
    )
    args = vars(parser.parse_args(argv))
    set_up_logging()
    options = {"workdir": args["local_workdir"]} if "local_workdir" in args else {}
    lines = run(
        args["runs"],
        args["output"],
        evaluation=args["evaluation"],
        samples=args["samples"],
        **options,
    )
    print("\n".join(lines))
    log.info("written to %s: %s, %s", args["output"], HTML, MARKDOWN)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
