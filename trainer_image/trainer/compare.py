"""Trainings against each other: settings, losses at equal tokens, the spread over seeds.

    python -m trainer.compare RUN RUN … [--output=DIR]

A RUN is the output location of a training. Runs that differ in ``seed`` alone form a group; whether
two groups differ by more than their seeds do is said. The tables are printed; ``compare.html`` at
the output has the curves too.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

from collections.abc import Sequence
from pathlib import Path

from trainer.reports.comparison import RunsCompared, short_names
from trainer.reports.rendering import page
from trainer.reports.runs import Run
from trainer.runtime.commands import run_command
from trainer.runtime.errors import UsageError
from trainer.runtime.log import log, set_up_logging
from trainer.settings.config import DEFAULT_WORKDIR
from trainer.settings.flags import build_parser
from trainer.storage.places import check_output
from trainer.storage.publish import publishing

HTML = "compare.html"


def run(
    runs: Sequence[str],
    output: str = "",
    *,
    workdir: str = DEFAULT_WORKDIR,
) -> str:
    """Compare runs, and write ``compare.html`` where an output is given.

    Args:
        runs: their output locations.
        output: a local directory or ``gs://`` prefix; a page that is there is replaced.
        workdir: scratch space for what is uploaded.

    Returns:
        The tables as text.

    Raises:
        UsageError: there are less than two runs, or a URI is malformed.
        MetricsError: there is no record of a run, or it is damaged.
        StorageError: something cannot be read or written.
    """
    if len(runs) < 2:
        raise UsageError(f"{len(runs)} run: give two or more to compare them")
    if output:
        check_output(output)
    named = zip(runs, short_names(runs), strict=True)
    compared = RunsCompared([Run.read(location, name) for location, name in named])
    tables, warnings = compared.tables(), compared.warnings()
    if output:
        text = page(
            "compare.html.j2",
            title=f"{len(runs)} runs compared",
            keys=compared.keys,
            warnings=warnings,
            plots=compared.plots(),
            tables=tables,
        )
        with publishing(output, last=HTML, workdir=Path(workdir), replacing=True) as directory:
            (directory / HTML).write_text(text, encoding="utf-8")
    parts = ["\n".join([table.caption, table.text(), *table.notes]) for table in tables]
    return "\n\n".join([*parts, *(f"note: {text}" for text in warnings)])


def main(argv: list[str]) -> None:
    """The command line; prints the tables."""
    parser = build_parser("python -m trainer.compare", str(__doc__), only=("local_workdir",))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output of a training, or gs:// URI")
    parser.add_argument("--output", default="", metavar="DIR", help="a directory or gs:// URI")
    args = vars(parser.parse_args(argv))
    set_up_logging()
    options = {"workdir": args["local_workdir"]} if "local_workdir" in args else {}
    print(run(args["runs"], args["output"], **options))
    if args["output"]:
        log.info("written to %s: %s", args["output"], HTML)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
