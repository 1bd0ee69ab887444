"""One update: clipping and AdamW against their formulas, and what a non-finite gradient leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from trainer.models.student import Student, StudentConfig
from trainer.runtime.processes import Processes
from trainer.settings.config import TrainConfig
from trainer.training.precision import Precision
from trainer.training.step import TrainStep

CONFIG = TrainConfig(grad_clip=1.0, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, compile="off")
LEARNING_RATE = 3e-3

device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="fused AdamW's flags are CUDA's"
                ),
            ],
        ),
    ],
)


@dataclass
class Reference:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, 2019, algorithm 2) in fp64."""

    weights: dict[str, Tensor]
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    updates: int = 0

    def update(self, gradients: dict[str, Tensor]) -> float:
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
        if not math.isfinite(norm):
            return norm
        self.updates += 1
        scale = min(1.0, CONFIG.grad_clip / norm)
        beta1, beta2 = CONFIG.betas
        for name, gradient in gradients.items():
            g = gradient.double() * scale
            zero = torch.zeros_like(g)
            m = self.first[name] = beta1 * self.first.get(name, zero) + (1 - beta1) * g
            v = self.second[name] = beta2 * self.second.get(name, zero) + (1 - beta2) * g * g
            corrected = (v / (1 - beta2**self.updates)).sqrt() + CONFIG.eps
            decay = CONFIG.weight_decay if gradient.ndim >= 2 else 0.0
            weight = self.weights[name] * (1 - LEARNING_RATE * decay)
            self.weights[name] = weight - LEARNING_RATE * m / (1 - beta1**self.updates) / corrected
        return norm


class Updates:
    """A step on the device and the reference, given the same gradients."""

    def __init__(self, device: str) -> None:
        sizes = StudentConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=2, positions=16)
        student = Student(sizes).initialize(0)
        precision = Precision(torch.device(device), torch.float32, torch.float32)
        self.step = TrainStep(CONFIG, student, None, precision, Processes(), {})
        self.generator = torch.Generator().manual_seed(1)
        self.reference = Reference(self.weights())

    def weights(self) -> dict[str, Tensor]:
        named = self.step.student.named_parameters()
        return {name: p.detach().cpu().double() for name, p in named}

    def moments(self) -> list[Tensor]:
        states = self.step.optimizer.state.values()
        return [value.detach().cpu().clone() for state in states for value in state.values()]

    def give(self, norm: float, spoil: Callable[[Tensor], object] | None = None) -> None:
        """One update with random gradients of this norm, on both sides."""
        drawn = {
            name: torch.randn(p.shape, generator=self.generator)
            for name, p in self.step.student.named_parameters()
        }
        length = math.sqrt(sum(float((g**2).sum()) for g in drawn.values()))
        gradients = {name: g * (norm / length) for name, g in drawn.items()}
        if spoil is not None:
            spoil(gradients["ln_f.weight"])
        for name, parameter in self.step.student.named_parameters():
            parameter.grad = gradients[name].to(parameter.device)
        expected = self.reference.update(gradients)
        found = float(self.step.update(LEARNING_RATE))
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)

    def check(self) -> None:
        for name, weight in self.weights().items():
            torch.testing.assert_close(weight, self.reference.weights[name], rtol=1e-5, atol=1e-6)


@device
def test_clipped_updates_follow_the_formulas(device: str) -> None:
    updates = Updates(device)
    for norm in (0.3, 7.0, 1.0, 400.0, 1e-3):
        updates.give(norm)
        updates.check()
    assert list(updates.step.outcomes(wait=True)) == [True] * 5


@device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_with_one_bad_number_changes_nothing(device: str, value: float) -> None:
    updates = Updates(device)
    for norm in (0.3, 7.0):
        updates.give(norm)
    weights, moments = updates.weights(), updates.moments()
    updates.give(1.0, lambda gradient: gradient[3].fill_(value))
    for name, weight in updates.weights().items():
        assert torch.equal(weight, weights[name]), name
    # Among them the count of updates, on which the correction of the bias depends
    assert all(torch.equal(*pair) for pair in zip(updates.moments(), moments, strict=True))
    updates.give(2.0)
    updates.check()
    assert list(updates.step.outcomes(wait=True)) == [True, True, False, True]
    assert list(updates.step.outcomes(wait=True)) == []


@device
def test_the_newest_outcome_is_not_waited_for_on_a_gpu(device: str) -> None:
    updates = Updates(device)
    updates.give(1.0)
    updates.give(1.0, lambda gradient: gradient[0].fill_(math.nan))
    early = list(updates.step.outcomes(wait=False))
    late = list(updates.step.outcomes(wait=True))
    assert early + late == [True, False]
    assert len(late) == (1 if device == "cuda" else 0)
