"""The loss from sparse targets against the whole distribution's, in fp64 and by `distill_loss`."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.loss.chunked import Mix, distill_loss
from trainer.loss.sparse import SparseTargets, sparse_distill_loss
from trainer.settings.config import TrainConfig
from trainer.targets.records import Layout
from trainer.targets.sampling import draw

VOCABULARY, WIDTH = 151, 16


def operands(tokens: int, kind: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Student's hidden state and head, teacher's hidden state and head, labels."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(kind)

    hidden, head = normal(tokens, WIDTH), normal(VOCABULARY, WIDTH, scale=0.4)
    t_hidden, t_head = normal(tokens, 24), normal(VOCABULARY, 24, scale=0.4)
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), t_hidden, t_head, labels


def whole(t_logits: Tensor, temperature: float) -> SparseTargets:
    """All of the vocabulary, and nothing drawn."""
    log_p = torch.log_softmax(t_logits / temperature, -1)
    ids = torch.arange(VOCABULARY).expand(len(log_p), -1)
    return SparseTargets(ids, log_p.exp(), (log_p.exp() * log_p).sum(-1))


def gradients(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    assert hidden.grad is not None
    assert head.grad is not None
    found = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.2, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_whole_vocabulary_gives_the_online_loss(alpha: float, temperature: float) -> None:
    hidden, head, t_hidden, t_head, labels = operands(45)
    mix = Mix(alpha, temperature)
    online = distill_loss(hidden, head, t_hidden, t_head, labels, mix)
    online.loss.backward()
    expected = gradients(hidden, head)
    targets = whole(t_hidden @ t_head.T, temperature)
    # Chunks of 7 tokens, so that the last one is not full
    sparse = sparse_distill_loss(hidden, head, targets, labels, mix, chunk_elements=7 * VOCABULARY)
    sparse.loss.backward()
    assert float(sparse.loss.detach()) == pytest.approx(float(online.loss.detach()), rel=1e-6)
    for found, wanted in zip(gradients(hidden, head), expected, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-6
    if alpha > 0.0:
        assert float(sparse.kd) == pytest.approx(float(online.kd), rel=1e-5)


def test_an_estimate_against_its_definition_in_fp64() -> None:
    hidden, head, t_hidden, t_head, labels = operands(9, torch.float64)
    layout, mix = Layout(VOCABULARY, (1.0, 1.5), 40), Mix(0.6, 1.5)
    offsets = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    records = layout.encode(draw(t_hidden @ t_head.T, labels, layout, offsets), offsets)
    targets = layout.decode(records, 1.5)
    output = sparse_distill_loss(hidden, head, targets, labels, mix)
    output.loss.backward()
    found = gradients(hidden, head)
    logits = hidden @ head.T
    log_q = F.log_softmax(logits / 1.5, -1)
    cross = (targets.weights.double() * log_q.gather(1, targets.ids.long())).sum(1)
    kd = (targets.negentropy.double() - cross).mean()
    loss = 0.6 * 1.5**2 * kd + 0.4 * F.cross_entropy(logits, labels)
    loss.backward()
    assert float(output.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-9)
    for ours, wanted in zip(found, gradients(hidden, head), strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-9, atol=1e-12)


SCHEDULE = TrainConfig(temp_schedule="0:1.2,400:1.1,800:1.0").schedule_T


@pytest.mark.parametrize("temperature", [1.0, 1.2, 2.0, *SCHEDULE.values()])
def test_the_mean_gradient_is_the_dense_one(temperature: float) -> None:
    """Over many draws, through records: within the standard error at every temperature."""
    groups, draws, tokens = 20, 12, 8
    hidden, head, t_hidden, t_head, labels = operands(tokens)
    mix = Mix(0.7, temperature)
    distill_loss(hidden, head, t_hidden, t_head, labels, mix).loss.backward()
    expected = torch.cat([part.flatten() for part in gradients(hidden, head)])
    layout = Layout(VOCABULARY, tuple(sorted({1.0, 1.2, 2.0, *SCHEDULE.values()})), 64)
    generator = torch.Generator().manual_seed(5)
    logits, labels = (t_hidden @ t_head.T).repeat(draws, 1), labels.repeat(draws)
    found = []
    for _ in range(groups):
        offsets = torch.rand(2, draws * tokens, generator=generator)
        records = layout.encode(draw(logits, labels, layout, offsets[0]), offsets[1])
        targets = layout.decode(records, temperature)
        sparse_distill_loss(hidden.repeat(draws, 1), head, targets, labels, mix).loss.backward()
        found.append(torch.cat([part.flatten() for part in gradients(hidden, head)]))
    stacked = torch.stack(found)
    deviation = stacked.std(0) / math.sqrt(groups)
    # Where nothing is random, fp32 rounds
    scores = (stacked.mean(0) - expected) / (deviation + 1e-6 * expected.abs().max())
    # Student's distribution of 19 degrees of freedom, whose variance is 19 / 17
    assert float(scores.abs().max()) < 7.0
    assert 0.5 < float(scores.square().mean()) < 1.8


def test_operands_that_do_not_fit_are_refused() -> None:
    hidden, head, t_hidden, t_head, labels = operands(6)
    targets = whole(t_hidden @ t_head.T, 1.0)
    with pytest.raises(ValueError, match="no sparse estimate of 'jsd' is unbiased"):
        sparse_distill_loss(hidden, head, targets, labels, Mix(0.5, 1.0, "jsd"))
    with pytest.raises(ValueError, match=r"alpha is 0\.5, so targets are needed"):
        sparse_distill_loss(hidden, head, None, labels, Mix(0.5, 1.0))
    short = SparseTargets(*(field[:5] for field in targets))
    with pytest.raises(ValueError, match="do not agree over 6 tokens"):
        sparse_distill_loss(hidden, head, short, labels, Mix(0.5, 1.0))
