"""The table of divergences, and what one more entry reaches: settings, both losses, a GPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.loss import fused as fused_loss
from trainer.loss.chunked import Mix, distill_loss
from trainer.loss.divergences import DIVERGENCES, Divergence
from trainer.models.student import Student, StudentConfig
from trainer.training.precision import Precision
from trainer.training.step import StudentWithLoss

SKEW = 0.1


def skewed_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ SKEW · p + (1 − SKEW) · q) (Ko et al., 2024, arXiv:2402.03898)."""
    p, q = log_p.exp(), log_q.exp()
    m = SKEW * p + (1 - SKEW) * q
    by_q = (SKEW - 1) * p / m
    gradient = q * (by_q - (q * by_q).sum(-1, keepdim=True))
    return (p * (log_p - m.log())).sum(), gradient


def skewed_kl_by_definition(teacher_logits: Tensor, logits: Tensor, mix: Mix) -> Tensor:
    """The mean over tokens, for autograd."""
    p = (teacher_logits / mix.temperature).softmax(-1)
    q = (logits / mix.temperature).softmax(-1)
    return (p * (p / (SKEW * p + (1 - SKEW) * q)).log()).sum(-1).mean()


@pytest.fixture
def skewed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a divergence that the table has gained and the kernel lacks."""
    monkeypatch.setitem(DIVERGENCES, "skewed_kl", Divergence(skewed_kl, "Ko et al., 2024"))
    return "skewed_kl"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_those_of_the_sum(name: str) -> None:
    log_p, logits = draw(7, 30).log_softmax(-1), draw(7, 31)[:, :30].requires_grad_()
    total, gradient = DIVERGENCES[name].sum_and_gradient(log_p, logits.log_softmax(-1))
    (expected,) = torch.autograd.grad(total, logits)
    assert float(total.detach()) > 0.1
    assert torch.allclose(gradient, expected, atol=1e-14)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_distributions_do_not_diverge(name: str) -> None:
    log_p = draw(7, 30).log_softmax(-1)
    total, gradient = DIVERGENCES[name].sum_and_gradient(log_p, log_p.clone())
    assert float(total) == pytest.approx(0.0, abs=1e-14)
    assert float(gradient.abs().max()) <= 1e-14


def test_kernel_branches_are_told_apart() -> None:
    branches = [d.kernel_branch for d in DIVERGENCES.values() if d.kernel_branch is not None]
    assert len(set(branches)) == len(branches)
    assert 0 not in branches, "0 is cross entropy alone"


def test_the_chunked_loss_trains_with_another_divergence(skewed: str) -> None:
    hidden, head = draw(11, 6).requires_grad_(), draw(37, 6).requires_grad_()
    t_hidden, t_head, labels = draw(11, 9), draw(37, 9), torch.arange(11)
    mix = Mix(0.7, 2.0, skewed)
    output = distill_loss(hidden, head, t_hidden, t_head, labels, mix, chunk_elements=4 * 37)
    found = torch.autograd.grad(output.loss, (hidden, head))
    logits = hidden @ head.T
    kd = skewed_kl_by_definition(t_hidden @ t_head.T, logits, mix)
    loss = 0.7 * 2.0**2 * kd + 0.3 * F.cross_entropy(logits, labels)
    expected = torch.autograd.grad(loss, (hidden, head))
    assert torch.allclose(output.loss, loss, rtol=1e-12)
    assert torch.allclose(output.kd, kd, rtol=1e-12)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def test_settings_take_another_divergence_and_do_not_import_torch() -> None:
    """In a process of its own: the table is read when the settings are imported."""
    code = """
import sys
from trainer.loss.divergences import DIVERGENCES, Divergence
DIVERGENCES["skewed_kl"] = Divergence(lambda log_p, log_q: (0.0, 0.0), "")
from trainer.settings.flags import build_parser, settings_from_args
args = build_parser("train", "").parse_args(["--kd_scheme=skewed_kl"])
print(settings_from_args(args), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "{'kd_scheme': 'skewed_kl'} False", done.stderr


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_kernel_takes_what_it_has_a_branch_for(name: str) -> None:
    has_branch = DIVERGENCES[name].kernel_branch is not None
    assert fused_loss.in_kernel(Mix(0.5, 1.0, name), [torch.bfloat16, torch.float32]) == has_branch
    assert not fused_loss.in_kernel(Mix(0.5, 1.0, name), [torch.bfloat16, torch.float64])


def test_the_kernel_does_not_take_what_it_lacks(skewed: str) -> None:
    assert not fused_loss.in_kernel(Mix(0.5, 1.0, skewed), [torch.bfloat16])
    assert not fused_loss.in_kernel(Mix(0.5, 1.0, "no such"), [torch.bfloat16])
    assert not fused_loss.in_kernel(Mix(0.0, 1.0, "no such"), [torch.bfloat16])
    # Of cross entropy alone it needs no branch
    assert fused_loss.in_kernel(Mix(0.0, 1.0, skewed), [torch.bfloat16])
    operands = (torch.zeros(4, 8), torch.zeros(11, 8), torch.zeros(4, 8), torch.zeros(11, 8))
    with pytest.raises(ValueError, match="has no kernel for divergence 'skewed_kl'"):
        fused_loss.distill_loss(*operands, torch.arange(4), Mix(0.5, 1.0, skewed))


@pytest.mark.parametrize("loss", [distill_loss, fused_loss.distill_loss])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_an_unknown_divergence_is_refused(loss: Any, alpha: float) -> None:
    operands = (torch.zeros(4, 8), torch.zeros(11, 8), torch.zeros(4, 8), torch.zeros(11, 8))
    with pytest.raises(ValueError, match="unknown divergence 'no such'; known: forward_kl, "):
        loss(*operands, torch.arange(4), Mix(alpha, 1.0, "no such"))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available(), reason="the fused loss needs a CUDA device"
                ),
            ],
        ),
    ],
)
def test_the_step_computes_what_the_kernel_lacks(skewed: str, device: str) -> None:
    """On a GPU too, where the same operands go to the kernel under another divergence."""
    student = Student(StudentConfig(64, d_model=16, n_layers=1, n_heads=2, positions=8))
    student.initialize(0).to(device)
    ids = torch.arange(24, device=device).view(3, 8)
    t_hidden, t_head = (part.float().to(device) for part in (draw(3, 8, 12), draw(64, 12)))
    teacher: Any = SimpleNamespace(head=t_head, bias=None)
    precision = Precision(torch.device(device), torch.float32, torch.float32)
    mix = Mix(0.7, 2.0, skewed)
    loss, ce, kd = StudentWithLoss(student, teacher, precision)(ids, ids, t_hidden, None, mix)
    found = torch.autograd.grad(loss, list(student.parameters()))

    logits = student.logits(ids).flatten(0, 1)
    expected_kd = skewed_kl_by_definition((t_hidden @ t_head.T).flatten(0, 1), logits, mix)
    expected_ce = F.cross_entropy(logits, ids.flatten())
    reference = 0.7 * 2.0**2 * expected_kd + 0.3 * expected_ce
    expected = torch.autograd.grad(reference, list(student.parameters()))
    for one, other in zip((loss, ce, kd), (reference, expected_ce, expected_kd), strict=True):
        assert torch.allclose(one, other, rtol=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)
    if device == "cuda":
        operands = (student(ids).flatten(0, 1), student.lm_head.weight, t_hidden[0], t_head)
        assert not fused_loss.usable(*operands, mix)
        assert fused_loss.usable(*operands, Mix(0.7, 2.0, "jsd"))
