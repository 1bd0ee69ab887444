"""The teacher beside the student: the same hidden states, whatever runs in between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from trainer.loss.chunked import Mix
from trainer.models.teacher import Teacher, TeacherSpec
from trainer.targets.records import Layout
from trainer.training.feed import Feed

VOCABULARY = 300

TAUGHT = Mix(0.5, 1.0)


def teacher_of(device: str, *, fast: bool) -> Teacher:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=6, n_head=2, n_positions=512)
    model = GPT2LMHeadModel(config).to(device)
    teacher = Teacher(model, TeacherSpec("t", 512, VOCABULARY))
    if fast:
        teacher.prepare(compiled=True, sharded=False)
    return teacher


def batches(count: int, *, pinned: bool) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (8, 129), generator=generator)
        inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        yield (inputs.pin_memory(), labels.pin_memory()) if pinned else (inputs, labels)


def test_on_the_cpu_the_batch_is_as_given_and_the_teacher_runs_where_it_is_asked_for() -> None:
    teacher = teacher_of("cpu", fast=False)
    feed = Feed(teacher, torch.device("cpu"))
    for inputs, labels in batches(2, pinned=False):
        batch = feed.place(inputs, labels, TAUGHT)
        assert torch.equal(batch.inputs, inputs)
        assert torch.equal(batch.labels, labels)
        assert batch.teacher_hidden is not None
        assert torch.equal(batch.teacher_hidden, teacher.hidden(inputs))
        assert feed.place(inputs, labels, Mix(0.0, 1.0)).teacher_hidden is None
    assert Feed(None, torch.device("cpu")).place(inputs, labels, TAUGHT).teacher_hidden is None


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are CUDA's"),
            ],
        ),
    ],
)
def test_records_in_place_of_a_teacher_are_decoded_at_the_updates_temperature(device: str) -> None:
    """On a GPU while the student's stream is busy with the batch before."""
    layout, pinned = Layout(VOCABULARY, (1.0, 1.5), 64), device == "cuda"
    feed = Feed(None, torch.device(device), layout)
    generator = torch.Generator().manual_seed(2)
    for number, (inputs, labels) in enumerate(batches(6, pinned=pinned)):
        shape = (*inputs.shape, layout.record_bytes)
        records = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        mix = Mix((0.5, 0.0)[number == 3], (1.0, 1.5)[number % 2])
        given = records.pin_memory() if pinned else records
        batch = feed.place(inputs, labels, mix, given)
        if pinned:
            torch.cuda._sleep(20_000_000)
        assert torch.equal(batch.inputs.cpu(), inputs)
        assert batch.teacher_hidden is None
        if number == 3:
            assert batch.targets is None
            continue
        assert batch.targets is not None
        for found, expected in zip(
            batch.targets, layout.decode(records.flatten(0, 1), mix.temperature), strict=True
        ):
            torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are CUDA's")
@pytest.mark.parametrize("fast", [True, False], ids=["fast body", "stock body"])
@pytest.mark.parametrize("pinned", [True, False], ids=["from the host", "on the device"])
def test_a_teacher_that_runs_ahead_overwrites_nothing(fast: bool, pinned: bool) -> None:
    """The student's stream is kept busy, so that each batch is read long after it was made, and
    the teacher is also called on that stream, with longer batches, as an evaluation does."""
    teacher = teacher_of("cuda", fast=fast)
    given = [(inputs.cuda(), labels.cuda()) for inputs, labels in batches(12, pinned=False)]
    long = torch.randint(0, VOCABULARY, (8, 512), device="cuda")
    expected = [teacher.hidden(inputs).clone() for inputs, _ in given]
    expected_long = teacher.hidden(long).clone()
    torch.cuda.synchronize()
    feed = Feed(teacher, torch.device("cuda"))
    seen, seen_long = [], []
    source = batches(12, pinned=True) if pinned else iter(given)
    for number, (inputs, labels) in enumerate(source):
        batch = feed.place(inputs, labels, TAUGHT)
        torch.cuda._sleep(20_000_000)
        assert batch.teacher_hidden is not None
        seen.append([part.clone() for part in batch[:3]])
        if number % 4 == 2:
            seen_long.append(teacher.hidden(long).clone())
        del batch
    torch.cuda.synchronize()
    for (inputs, labels), hidden, found in zip(given, expected, seen, strict=True):
        assert torch.equal(found[0], inputs)
        assert torch.equal(found[1], labels)
        torch.testing.assert_close(found[2], hidden, rtol=1e-4, atol=1e-4)
    for found_long in seen_long:
        torch.testing.assert_close(found_long, expected_long, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are CUDA's")
def test_the_teacher_does_not_wait_for_the_update_before() -> None:
    taught: list[torch.cuda.Event] = []

    class Marking(Teacher):
        def hidden(self, ids: Tensor) -> Tensor:
            found = super().hidden(ids)
            taught.append(mark())
            return found

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    teacher = teacher_of("cuda", fast=True)
    teacher.__class__ = Marking
    feed = Feed(teacher, torch.device("cuda"))
    start, trained = mark(), []
    for inputs, labels in batches(6, pinned=True):
        feed.place(inputs, labels, TAUGHT)
        torch.cuda._sleep(200_000_000)
        trained.append(mark())
    torch.cuda.synchronize()
    taught_at, trained_at = ([start.elapsed_time(e) for e in es] for es in (taught, trained))
    # From the third call on, which replays a graph instead of capturing one
    for number in range(3, 6):
        assert taught_at[number] < trained_at[number - 1], "ahead of the update before"
        assert taught_at[number] > trained_at[number - 2], "by no more than one"
