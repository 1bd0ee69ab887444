"""A model card, filled from a checkpoint's metadata.

Its head is the YAML that the Hugging Face hub reads; see
https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.models.hugging_face import looks_local
from trainer.models.student import StudentConfig
from trainer.runtime.errors import UsageError
from trainer.settings.schedules import ALPHA_RANGE, StepSchedule, schedule_entries
from trainer.storage.places import is_remote

_LOSS = re.compile(r"val_loss_(student|teacher)@(\d+)")
_LONGEST = 200
"""Characters of a text from the metadata."""

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50, do_sample=True)[0]))
```"""


def model_card(
    source: Checkpoint,
    student: StudentConfig,
    *,
    architecture: str,
    positions: int,
    parameters: int,
    license: str | None = None,
) -> str:
    """The text of ``README.md`` beside an exported student.

    What the metadata does not tell is left out. Of places on a machine or in a bucket the last part
    alone is shown.

    Args:
        source: the checkpoint.
        student: its shapes.
        architecture: the stock form's name.
        positions: the longest context in tokens.
        parameters: how many there are.
        license: its identifier on the hub; None is unknown.
    """
    meta = source.meta
    shape = (
        f"{parameters / 1e6:.1f} M parameters: {student.n_layers} layers, {student.d_model} wide,"
        f" {student.n_heads} heads, a vocabulary of {student.vocab_size} and contexts of up to"
        f" {positions} tokens, in the form of {architecture}"
    )
    teacher = _name(meta.get("teacher_name")) if _taught(meta) else None
    lead = f"distilled from {teacher}" if teacher else "trained on text"
    training = [f"| {what} | {value} |" for what, value in _training(source, teacher) if value]
    parts = [
        f"---\n{_front_matter(meta, license)}\n---",
        f"# {_title(meta)}",
        f"A small causal language model, {lead}. It has {shape}.",
        "## Use",
        _USE,
        "## Training",
        "\n".join(["| | |", "| --- | --- |", *training]) if training else "Nothing is recorded.",
        "## Evaluation",
        _evaluation(meta),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(meta: Mapping[str, Any], license: str | None) -> str:
    from huggingface_hub import ModelCardData

    dataset = _dataset(meta)
    name = dataset.get("name")
    on_hub = isinstance(name, str) and not (looks_local(name) or is_remote(name))
    tags = ["knowledge-distillation"] if _taught(meta) else None
    return ModelCardData(
        license=license or "unknown",
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=[_plain(name)] if on_hub else None,
        tags=tags,
    ).to_yaml()


def _title(meta: Mapping[str, Any]) -> str:
    names = [_name(_dataset(meta).get("name")), _name(meta.get("teacher_name"))]
    return " – ".join(["Student", *filter(None, names)])


def _training(source: Checkpoint, teacher: str | None) -> list[tuple[str, str]]:
    """What the table of the training shows; empty texts are left out."""
    meta = source.meta
    dataset, origin = _dataset(meta), _mapping(meta, "origin")
    first = max(source.trainer_state.get("first_step", 0), 0)
    updates = max(source.step - first, 0)
    windows, context = meta.get("global_batch"), meta.get("block_size")
    tokens = updates * windows * context if windows and context else 0
    came = [
        _name(origin.get("checkpoint")),
        f"step {origin['step']}" if "step" in origin else "",
        f"context {origin['block_size']}" if origin.get("block_size") else "",
    ]
    named = [_name(dataset.get("name")), _plain(dataset.get("config"))]
    return [
        ("data set", ", ".join(filter(None, [*named, _plain(dataset.get("revision"))]))),
        ("teacher", teacher or ""),
        ("context", f"{context} tokens" if context else ""),
        ("step", f"{source.step}"),
        ("windows an update", _plain(windows)),
        ("tokens seen in this phase", f"{tokens:,}" if tokens else ""),
        ("alpha", _plain(meta.get("alpha_schedule") or meta.get("kd_alpha"))),
        ("temperature", _plain(meta.get("temp_schedule") or meta.get("kd_temperature"))),
        ("peak learning rate", _plain(meta.get("lr_peak"))),
        ("warmup updates", _plain(meta.get("warmup_steps"))),
        ("seed", _plain(meta.get("seed"))),
        ("started from", ", ".join(filter(None, came)) if origin else ""),
    ]


def _evaluation(meta: Mapping[str, Any]) -> str:
    losses: dict[int, dict[str, float]] = {}
    for key, value in _mapping(meta, "metrics").items():
        found = _LOSS.fullmatch(key)
        if found and isinstance(value, float) and math.isfinite(value):
            losses.setdefault(int(found[2]), {})[found[1]] = value
    if not losses:
        return "The checkpoint has not been evaluated."
    rows = [
        f"| {context} | {_loss(of.get('student'))} | {_perplexity(of.get('student'))}"
        f" | {_loss(of.get('teacher'))} |"
        for context, of in sorted(losses.items())
    ]
    head = ["| context | loss | perplexity | teacher's loss |", "| --- | --- | --- | --- |"]
    most = _mapping(meta, "settings").get("eval_max_tokens")
    part = "the whole validation split" if most == 0 else "the validation split"
    if isinstance(most, int) and most > 0:
        part = f"at most {most:,} tokens of the validation split"
    words = (
        f"On {part}, after step {meta.get('metrics_step')}; losses are in nats per"
        " token, by context in tokens."
    )
    return "\n".join([words, "", *head, *rows])


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _perplexity(value: float | None) -> str:
    return "–" if value is None or value > 700 else f"{math.exp(value):.2f}"


def _taught(meta: Mapping[str, Any]) -> bool:
    """Whether a teacher had a weight at all."""
    alpha, schedule = meta.get("kd_alpha"), meta.get("alpha_schedule")
    if not schedule:
        return isinstance(alpha, float | int) and alpha > 0
    first = _mapping(meta, "settings").get("alpha")
    initial = float(first) if isinstance(first, float | int) else 0.0
    try:
        entries = schedule_entries(str(schedule), "alpha_schedule", ALPHA_RANGE)
    except UsageError:  # of another program
        return True
    return any(value > 0.0 for value in StepSchedule(initial, entries).values())


def _dataset(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(meta, "dataset")


def _mapping(meta: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = meta.get(key)
    return value if isinstance(value, Mapping) else {}


def _name(value: Any) -> str:
    """A name as it is; of a place its last part."""
    text = _plain(value)
    if looks_local(text) or is_remote(text):
        return text.rstrip("/").rpartition("/")[2]
    return text


def _plain(value: Any) -> str:
    """A value as text that Markdown takes as it stands; empty for None."""
    text = "" if value is None else " ".join(str(value).split())
    return re.sub(r"[|`<>\[\]]", "", text)[:_LONGEST]
