"""What is drawn of a distribution, and how it is stored, against the whole of it in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.targets.records import Layout
from trainer.targets.sampling import draw

TEMPERATURES = [(1.0,), (0.5,), (1.0, 1.2), (1.0, 1.2, 2.0)]


def logits_of(sharpness: float, vocabulary: int = 211) -> Tensor:
    generator = torch.Generator().manual_seed(int(10 * sharpness))
    return torch.randn(1, vocabulary, generator=generator, dtype=torch.float64) * sharpness


def offsets(draws: int) -> Tensor:
    return torch.rand(draws, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def estimates(
    logits: Tensor, layout: Layout, temperature: float, draws: int
) -> tuple[Tensor, Tensor]:
    """Estimates ``[draws, V]`` of one distribution, through records, and negentropies."""
    wide = logits.expand(draws, -1)
    drawn = draw(wide, torch.zeros(draws, dtype=torch.int64), layout, offsets(draws))
    targets = layout.decode(layout.encode(drawn, offsets(draws).flip(0)), temperature)
    whole = torch.zeros_like(wide).scatter_add_(1, targets.ids.long(), targets.weights.double())
    return whole, targets.negentropy


@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 2.0, 4.0])
def test_estimates_are_unbiased_at_every_temperature(
    temperatures: tuple[float, ...], sharpness: float
) -> None:
    draws = 1500
    logits, layout = logits_of(sharpness), Layout(211, temperatures, 64)
    for temperature in temperatures:
        p = torch.softmax(logits[0] / temperature, -1)
        whole, negentropy = estimates(logits, layout, temperature, draws)
        error = whole.mean(0) - p
        # An id that is drawn with probability p / c counts for c. What is left is the rounding of
        # those that come every time
        seldom = (whole > 0).double().mean(0) < 0.5
        counts_for = torch.where(seldom, whole[:, seldom].max(), whole.max(0).values)
        deviation = (p * counts_for / draws).sqrt()
        assert bool((error.abs() <= 4.5 * deviation + 1e-3 * p + 1e-5).all())
        often = seldom & (p > 0.02 * counts_for)
        assert float((error[often] / deviation[often]).square().mean()) < 2.0
        assert float(negentropy.mean()) == pytest.approx(float((p * p.log()).sum()), abs=1e-4)


def test_fewer_squared_errors_than_draws_at_random() -> None:
    draws, layout = 1000, Layout(211, (1.0,), 64)
    for sharpness in (0.3, 2.0):
        logits = logits_of(sharpness)
        p = torch.softmax(logits[0], -1)
        whole, _ = estimates(logits, layout, 1.0, draws)
        at_random = torch.distributions.Multinomial(layout.places, p).sample((draws,))
        ours, theirs = (
            (kind - p).square().sum(1).mean() for kind in (whole, at_random / layout.places)
        )
        assert float(ours) < 0.95 * float(theirs)


def test_entries_are_the_largest_then_a_sample_of_the_others() -> None:
    logits, layout = logits_of(2.0), Layout(211, (1.0,), 64)
    drawn = draw(logits.expand(500, -1), torch.zeros(500, dtype=torch.int64), layout, offsets(500))
    kept = int(drawn.kept[0])
    assert 0 < kept < len(layout.drawn_beside) - 1
    beside = layout.drawn_beside[kept]
    assert layout.places >= kept + beside > 19  # an id and a code of 3 bytes, 19 times
    p = torch.softmax(logits[0], -1)
    assert torch.equal(drawn.ids[7, :kept], p.topk(kept).indices)
    assert all(len(set(row[: kept + beside].tolist())) == kept + beside for row in drawn.ids)
    threshold = float(drawn.level[0].exp())
    # With so many kept, what is left of the mass is what is left of the places, times c
    assert threshold == pytest.approx(float(1.0 - p.topk(kept).values.sum()) / beside)
    assert threshold >= float(p.topk(kept + 1).values[-1])
    before = float(1.0 - p.topk(kept - 1).values.sum()) / layout.drawn_beside[kept - 1]
    assert before < float(p.topk(kept).values[-1])


def test_all_of_a_small_vocabulary_is_kept_exactly() -> None:
    logits = logits_of(1.0, vocabulary=13).expand(5, -1)
    layout = Layout(13, (1.0, 2.0), 64)
    drawn = draw(logits, torch.arange(5), layout, offsets(5))
    assert torch.allclose(drawn.log_probs, torch.log_softmax(logits, -1))
    records = layout.encode(drawn, offsets(5))
    for temperature in (1.0, 2.0):
        targets = layout.decode(records, temperature)
        whole = torch.zeros(5, 13).scatter_add_(1, targets.ids.long(), targets.weights)
        expected = torch.softmax(logits / temperature, -1).float()
        assert torch.allclose(whole, expected, rtol=0.15)
        assert torch.equal(targets.ids.long(), drawn.ids)
    expected = torch.log_softmax(logits, -1)[torch.arange(5), torch.arange(5)].float()
    assert torch.allclose(layout.label_log_probs(records), expected, atol=1e-3)


def test_a_certain_teacher_gives_one_entry() -> None:
    logits = torch.full((3, 50), -200.0)
    logits[:, 7] = 200.0
    layout = Layout(50, (1.0, 1.5), 64)
    uniform = torch.tensor([0.0, 0.5, 0.999])
    records = layout.encode(draw(logits, torch.tensor([7, 7, 8]), layout, uniform), uniform)
    for temperature in (1.0, 1.5):
        targets = layout.decode(records, temperature)
        whole = torch.zeros(3, 50).scatter_add_(1, targets.ids.long(), targets.weights)
        assert torch.allclose(whole[:, 7], torch.ones(3), atol=1e-4)
        assert float(whole.sum()) == pytest.approx(3.0, abs=1e-3)
    assert layout.label_log_probs(records).tolist() == pytest.approx([0.0, 0.0, -64.0], abs=1e-3)


@pytest.mark.parametrize("logits", ["flat", "equal pairs"])
def test_equal_logits_are_told_apart(logits: str) -> None:
    """Twenty of the same, of which not all can be kept, and none but the same."""
    rows = torch.zeros(64, 300)
    if logits == "equal pairs":
        rows[:, 40:60] = 12.0
    layout = Layout(300, (1.0, 1.2), 64)
    records = layout.encode(
        draw(rows, torch.zeros(64, dtype=torch.int64), layout, torch.rand(64)), torch.rand(64)
    )
    targets = layout.decode(records, 1.0)
    whole = torch.zeros(64, 300).scatter_add_(1, targets.ids.long(), targets.weights)
    assert torch.allclose(whole.sum(1), torch.ones(64), atol=0.05)
    assert float((whole.mean(0) - torch.softmax(rows[0], -1)).abs().max()) < 0.05


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 1.2)])
@pytest.mark.parametrize("vocabulary", [300, 65_536, 70_000])
def test_ids_survive_a_record(vocabulary: int, temperatures: tuple[float, ...]) -> None:
    layout = Layout(vocabulary, temperatures, 64)
    assert layout.id_bytes == (4 if vocabulary > 65_536 else 2)
    logits = torch.zeros(4, vocabulary)
    logits[:, -1] = 20.0
    drawn = draw(logits, torch.zeros(4, dtype=torch.int64), layout, torch.rand(4))
    records = layout.encode(drawn, torch.rand(4))
    targets = layout.decode(records, 1.0)
    used = targets.weights > 0
    assert torch.equal(targets.ids.long()[used], drawn.ids[used])
    assert int(used.sum(1).min()) == 1 + layout.drawn_beside[1]
    assert int(targets.ids[0, 0]) == vocabulary - 1
    assert layout.largest_id(records.numpy()) == vocabulary - 1


@pytest.mark.parametrize("vocabulary", [128, 300, 1000])
def test_blocks_draw_what_one_running_sum_draws(vocabulary: int) -> None:
    """Against systematic sampling as it is defined, over all ids at once, in fp64."""
    logits = logits_of(2.0, vocabulary).expand(40, -1)
    layout, uniform = Layout(vocabulary, (1.0,), 64), offsets(40)
    drawn = draw(logits, torch.zeros(40, dtype=torch.int64), layout, uniform)
    for row in range(40):
        kept = int(drawn.kept[row])
        chances = torch.softmax(logits[row], -1) / drawn.level[row].exp()
        chances[drawn.ids[row, :kept]] = 0.0
        running = torch.cat((torch.zeros(1), chances.cumsum(0))) + uniform[row]
        expected = (running.floor().diff() > 0).nonzero()[:, 0]
        found = drawn.ids[row, kept : kept + layout.drawn_beside[kept]]
        assert found.tolist() == expected.tolist()


def test_hostile_records_give_ids_of_the_vocabulary_or_are_told() -> None:
    layout = Layout(300, (1.0, 1.2), 64)
    records = torch.randint(0, 256, (500, 64), dtype=torch.uint8)
    targets = layout.decode(records, 1.2)
    assert bool(torch.isfinite(targets.weights).all())
    assert layout.largest_id(records.numpy()) >= 300
    assert layout.largest_id(np.zeros((3, 64), dtype=np.uint8)) == 0


def test_records_of_another_kind_are_refused() -> None:
    layout = Layout(300, (1.0, 1.2), 64)
    with pytest.raises(ValueError, match="temperature 2 is not among"):
        layout.decode(torch.zeros(3, 64, dtype=torch.uint8), 2.0)
    with pytest.raises(ValueError, match="not of 64 bytes"):
        layout.decode(torch.zeros(3, 63, dtype=torch.uint8), 1.0)
    with pytest.raises(ValueError, match="13 bytes are too few .*; at least 16 are needed"):
        Layout(300, (1.0, 1.2), 13)
    with pytest.raises(ValueError, match="are not ascending numbers"):
        Layout(300, (1.2, 1.0), 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here")
@pytest.mark.gpu
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 1.2)])
def test_a_gpu_draws_the_same(temperatures: tuple[float, ...]) -> None:
    """Compiled, of GPT-2's vocabulary, against the CPU; only ticks at an edge may differ."""
    generator = torch.Generator().manual_seed(1)
    logits = 3.0 * torch.randn(256, 50257, generator=generator)
    labels = torch.randint(0, 50257, (256,), generator=generator)
    uniform = torch.rand(256, generator=generator)
    layout = Layout(50257, temperatures, 64)
    expected = draw(logits, labels, layout, uniform)
    found = draw(logits.cuda(), labels.cuda(), layout, uniform.cuda(), compiled=True)
    assert torch.equal(found.kept.cpu(), expected.kept)
    assert float((found.ids.cpu() == expected.ids).double().mean()) > 0.995
    for name in ("level", "log_partitions", "negentropies", "label_log_probs"):
        ours, theirs = getattr(found, name).cpu(), getattr(expected, name)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), name
    records = layout.encode(found, uniform.cuda(), compiled=True)
    wide, places, dither = logits.cuda(), labels.cuda(), uniform.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = layout.encode(draw(wide, places, layout, dither, compiled=True), dither)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, records), "and the next pass waits for nothing"
    assert torch.allclose(
        layout.label_log_probs(records).cpu(), expected.label_log_probs, atol=2e-3
    )
    for temperature in temperatures:
        targets = layout.decode(records, temperature)
        assert float((targets.weights.sum(1) - 1.0).abs().mean()) < 0.1
