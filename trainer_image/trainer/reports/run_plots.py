"""The plots of a report: a run's curves by tokens trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.reports.amounts import whole
from trainer.reports.drawing import Line, Mark, Plot, plot
from trainer.reports.runs import WHO, Run


@dataclass(frozen=True)
class Plots:
    """Plots that stand together, over the same x axis."""

    title: str
    plots: Sequence[Plot]
    remark: str = ""


def phase_plots(runs: Sequence[Run]) -> Plots:
    """Validation losses over all runs, one after another on one axis of tokens."""
    offsets = [sum(run.tokens for run in runs[:number]) for number in range(len(runs))]
    end = sum(run.tokens for run in runs)
    drawn = []
    for context in sorted({context for run in runs for context in run.contexts}):
        lines = []
        for who in WHO:
            points = [
                (x + offset, y)
                for run, offset in zip(runs, offsets, strict=True)
                for x, y in [*run.validation(who, context), (run.tokens, math.nan)]
            ]
            lines.append(_line(who, points))
        evaluated = {_of_tokens(run, context) for run in runs if context in run.contexts}
        unit = f"nats{evaluated.pop() if len(evaluated) == 1 else ''}"
        title = f"Validation loss at context {context}"
        drawn.append(plot(title, unit, lines, end=end, dividers=offsets[1:]))
    return Plots(
        "From the first phase to the last",
        [one for one in drawn if one is not None],
        "Tokens count through; a dotted line is where the next phase begins, from the checkpoint"
        " picked.",
    )


def _line(who: str, points: Sequence[tuple[float, float]]) -> Line:
    return Line(who, points, who, "solid" if who == "student" else "dashed", dots=who == "student")


def run_plots(run: Run) -> Iterator[Plots]:
    """A run's curves, in groups."""
    validation = [_validation_plot(run, context) for context in run.contexts]

    groups = (
        ("Validation", validation),
        (
            "Training",
            [
                _trained(run, "Loss", "nats", "loss"),
                _trained(run, "Cross entropy", "nats", "ce"),
                _trained(run, "Distillation", "nats", "kd"),
            ],
        ),
        (
            "Schedules",
            [
                _trained(run, "Alpha", "weight of distillation", "alpha", zero=True, steps=True),
                _trained(run, "Temperature", "", "T", steps=True),
                _trained(run, "Learning rate", "", "lr", zero=True),
            ],
        ),
        (
            "Optimizer and machine",
            [
                _trained(run, "Gradient norm", "", "grad_norm"),
                _trained(run, "Throughput", "tokens per second", "tokens_per_second", zero=True),
                _trained(run, "Memory", "GiB, the most so far", "memory_gib", zero=True),
            ],
        ),
    )
    for title, plots in groups:
        drawn = [one for one in plots if one is not None]
        if drawn:
            yield Plots(title, drawn)


def _trained(
    run: Run, title: str, unit: str, name: str, *, steps: bool = False, zero: bool = False
) -> Plot | None:
    """A value of the log lines."""
    line = Line(title.lower(), run.training(name), steps=steps)
    return plot(title, unit, [line], end=run.tokens, labelled=False, zero=zero)


def _validation_plot(run: Run, context: int) -> Plot | None:
    marks = []
    if run.picked is not None and run.picked.tokens is not None:
        loss = run.loss_at(run.picked.step, context)
        marks = [] if loss is None else [Mark(run.picked.tokens, loss, "picked")]
    lines = [_line(who, run.validation(who, context)) for who in WHO]
    teacher = run.teacher_loss(context)
    if teacher is not None:  # the same at every evaluation
        lines[1] = _line(WHO[1], [(0.0, teacher), (run.tokens, teacher)])
    title = f"Validation loss at context {context}"
    return plot(title, f"nats{_of_tokens(run, context)}", lines, end=run.tokens, marks=marks)


def _of_tokens(run: Run, context: int) -> str:
    tokens, _ = run.evaluated_on(context)
    return "" if tokens is None else f", mean over {whole(tokens)} tokens"
