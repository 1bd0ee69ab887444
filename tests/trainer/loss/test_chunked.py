"""The loss against a plain fp64 computation on full logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.loss.chunked import Mix, distill_loss
from trainer.loss.divergences import DIVERGENCES


def reference(
    hidden: Tensor, head: Tensor, t_logits: Tensor, labels: Tensor, mix: Mix
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, written out on full fp64 logits; autograd gives the gradients."""
    hidden = hidden.detach().double().requires_grad_()
    head = head.detach().double().requires_grad_()
    logits = hidden @ head.T
    p = torch.softmax(t_logits / mix.temperature, -1)
    q = torch.softmax(logits / mix.temperature, -1)
    if mix.scheme == "forward_kl":
        divergence = (p * (p.log() - q.log())).sum(-1)
    elif mix.scheme == "reverse_kl":
        divergence = (q * (q.log() - p.log())).sum(-1)
    else:
        m = 0.5 * (p + q)
        divergence = 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)
    kd = divergence.mean()
    ce = F.cross_entropy(logits, labels)
    loss = mix.alpha * mix.temperature**2 * kd + (1 - mix.alpha) * ce
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return loss.detach(), hidden.grad, head.grad


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.2, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_match_fp64(
    scheme: str, temperature: float, alpha: float, padding: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(hash((temperature, alpha, padding)) % 2**31)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tokens, vocabulary = 45, 301
    hidden, head = draw(tokens, 24).requires_grad_(), draw(vocabulary, 24, scale=0.4)
    head.requires_grad_()
    t_hidden, t_head = draw(tokens, 40), draw(vocabulary + padding, 40, scale=0.4)
    t_bias = draw(vocabulary + padding) if bias else None
    if padding:
        t_head[vocabulary:] *= 10.0  # padding that would dominate if it were not left out
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    mix = Mix(alpha, temperature, scheme)
    # Chunks of 7 tokens, so that the last one is not full
    output = distill_loss(
        hidden, head, t_hidden, t_head, labels, mix, teacher_bias=t_bias, chunk_elements=7 * 301
    )
    output.loss.backward()
    t_logits = t_hidden.double() @ t_head[:vocabulary].double().T
    if t_bias is not None:
        t_logits = t_logits + t_bias[:vocabulary].double()
    loss, grad_hidden, grad_head = reference(hidden, head, t_logits, labels, mix)
    assert float(abs(output.loss.detach() - loss) / loss) <= 1e-5
    assert hidden.grad is not None
    assert head.grad is not None
    assert error(hidden.grad, grad_hidden) <= 1e-5
    assert error(head.grad, grad_head) <= 1e-5


def test_alpha_zero_needs_no_teacher_and_alpha_one_no_labels_gradient() -> None:
    hidden = torch.randn(6, 4, requires_grad=True)
    head = torch.randn(9, 4, requires_grad=True)
    labels = torch.arange(6)
    output = distill_loss(hidden, head, None, None, labels, Mix(0.0, 3.0))
    assert torch.allclose(output.loss, F.cross_entropy(hidden @ head.T, labels))
    assert math.isnan(float(output.kd))

    t_hidden, t_head = torch.randn(6, 5), torch.randn(9, 5)
    grads = []
    for wanted in (labels, labels.flip(0)):
        hidden.grad = None
        output = distill_loss(hidden, head, t_hidden, t_head, wanted, Mix(1.0, 2.0))
        output.loss.backward()
        assert hidden.grad is not None
        grads.append(hidden.grad.clone())
        assert math.isnan(float(output.ce))
    assert torch.equal(*grads)


def test_extreme_logits_stay_finite() -> None:
    hidden = (torch.randn(8, 4) * 300).requires_grad_()
    head = torch.randn(50, 4) * 10
    for scheme in DIVERGENCES:
        output = distill_loss(
            hidden,
            head.clone().requires_grad_(),
            torch.randn(8, 4) * 300,
            torch.randn(50, 4) * 10,
            torch.arange(8),
            Mix(0.5, 0.5, scheme),
        )
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert hidden.grad is not None
        assert torch.isfinite(hidden.grad).all()


def test_gradient_scales_with_what_flows_in() -> None:
    hidden, head = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    labels = torch.arange(4)
    (distill_loss(hidden, head, None, None, labels, Mix(0.0, 1.0)).loss * 0.25).backward()
    expected = torch.autograd.grad(0.25 * F.cross_entropy(hidden @ head.T, labels), (hidden, head))
    assert torch.allclose(hidden.grad, expected[0], atol=1e-6)
    assert torch.allclose(head.grad, expected[1], atol=1e-6)


def test_small_probabilities_reach_fp16_gradients() -> None:
    """Each is 6e-5 of one in 2,048 tokens: fp16 holds that only with the loss scaler's factor."""
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary = 2048, 16_384
    hidden = torch.randn(tokens, 8, generator=generator).half().requires_grad_()
    head = (torch.randn(vocabulary, 8, generator=generator) * 0.02).requires_grad_()
    labels = torch.randint(0, 50, (tokens,), generator=generator)
    (distill_loss(hidden, head, None, None, labels, Mix(0.0, 1.0)).loss * 65_536).backward()
    wide, rounded = hidden.detach().double(), head.detach().half().double()
    by_logit = torch.softmax(wide @ rounded.T, -1)
    by_logit[torch.arange(tokens), labels] -= 1
    grad_hidden, grad_head = by_logit @ rounded / tokens, by_logit.T @ wide / tokens
    assert hidden.grad is not None
    assert head.grad is not None
    assert hidden.grad.dtype == torch.float16
    assert error(hidden.grad.double() / 65_536, grad_hidden) <= 2e-3
    assert error(head.grad[50:].double() / 65_536, grad_head[50:]) <= 2e-3, "of tokens never seen"


def test_full_logits_never_exist() -> None:
    """Peak memory of the loss stays below what the logits alone would take."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, vocabulary, largest = 512, 4096, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(tokens, 8, requires_grad=True)
    head = torch.randn(vocabulary, 8, requires_grad=True)
    t_hidden, t_head = torch.randn(tokens, 8), torch.randn(vocabulary, 8)
    labels = torch.zeros(tokens, dtype=torch.int64)
    with Largest():
        distill_loss(
            hidden, head, t_hidden, t_head, labels, Mix(0.5, 2.0), chunk_elements=64 * vocabulary
        ).loss.backward()
    assert 0 < largest <= 64 * vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "\\[3\\] labels for 4 tokens"),
        ({"teacher_head": torch.zeros(8, 5)}, "vocabulary of 8 is smaller"),
        ({"teacher_hidden": None}, "teacher's hidden state is needed"),
        ({"teacher_hidden": torch.zeros(4, 9)}, "do not agree"),
        ({"student_head": torch.zeros(9, 9)}, "do not agree"),
        ({"mix": Mix(0.5, 1.0, "kl")}, "unknown divergence"),
    ],
)
def test_shapes_that_do_not_agree_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "student_hidden": torch.zeros(4, 3),
        "student_head": torch.zeros(9, 3),
        "teacher_hidden": torch.zeros(4, 5),
        "teacher_head": torch.zeros(9, 5),
        "labels": torch.zeros(4, dtype=torch.int64),
        "mix": Mix(0.5, 1.0),
    }
    with pytest.raises(ValueError, match=message):
        distill_loss(**(arguments | change))  # type: ignore[arg-type]
