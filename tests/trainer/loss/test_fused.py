"""The fused loss on a GPU against fp64 on full logits, and against the plain path."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.loss import chunked as distill
from trainer.loss import fused as fused_loss
from trainer.loss.chunked import DistillLoss, Mix
from trainer.loss.divergences import DIVERGENCES
from trainer.loss.sparse import SparseTargets, sparse_distill_loss

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the fused loss runs on a CUDA device; there is none here"
)
IN_KERNEL = [name for name, d in DIVERGENCES.items() if d.kernel_branch is not None]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}


class Case:
    """Random operands of the scale of a layer-normed model with GPT-2's initialization."""

    def __init__(
        self,
        tokens: int,
        vocabulary: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        *,
        padding: int = 0,
        bias: bool = False,
        seed: int = 0,
        device: str = "cuda",
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=device)
            return (drawn * scale).to(dtype)

        d_s, d_t = widths
        self.hidden = draw(tokens, d_s).requires_grad_()
        # The master weights are fp32; rounded here, so that casting them changes nothing
        self.head = draw(vocabulary, d_s, scale=0.5 / d_s**0.5).float().requires_grad_()
        self.t_hidden = draw(tokens, d_t)
        self.t_head = draw(vocabulary + padding, d_t, scale=0.8 / d_t**0.5)
        if padding:
            self.t_head[vocabulary:] *= 10.0  # would dominate if it were not left out
        self.t_bias = draw(vocabulary + padding, scale=0.5) if bias else None
        self.labels = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
        self.vocabulary = vocabulary

    def fused(self, mix: Mix, **options: int) -> DistillLoss:
        assert fused_loss.usable(self.hidden, self.head, self.t_hidden, self.t_head, mix)
        return fused_loss.distill_loss(
            self.hidden,
            self.head,
            self.t_hidden,
            self.t_head,
            self.labels,
            mix,
            teacher_bias=self.t_bias,
            **options,
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        hidden, head = torch.autograd.grad(loss, (self.hidden, self.head))
        return hidden, head

    def reference(self, mix: Mix) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and both gradients in fp64 from the definition, on full logits."""
        hidden = self.hidden.detach().double().requires_grad_()
        head = self.head.detach().double().requires_grad_()
        teacher = self.t_hidden.double() @ self.t_head[: self.vocabulary].double().T
        if self.t_bias is not None:
            teacher += self.t_bias[: self.vocabulary].double()
        logits = hidden @ head.T
        log_p = F.log_softmax(teacher / mix.temperature, -1)
        log_q = F.log_softmax(logits / mix.temperature, -1)
        if mix.scheme == "forward_kl":
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        elif mix.scheme == "reverse_kl":
            divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        else:
            log_m = (0.5 * (log_p.exp() + log_q.exp())).log()
            divergence = 0.5 * (log_p.exp() * (log_p - log_m)).sum(-1)
            divergence = divergence + 0.5 * (log_q.exp() * (log_q - log_m)).sum(-1)
        kd = mix.temperature**2 * divergence.mean()
        loss = mix.alpha * kd + (1.0 - mix.alpha) * F.cross_entropy(logits, self.labels)
        grad_hidden, grad_head = torch.autograd.grad(loss, (hidden, head))
        return loss.detach(), grad_hidden, grad_head


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def draw_shapes() -> list[tuple[int, int, tuple[int, int]]]:
    """Sizes that no block divides, and GPT-2's vocabulary."""
    chance = random.Random(7)
    shapes = [
        (chance.randint(1, 300), chance.randint(70, 9000), (8 * chance.randint(8, 96), 128))
        for _ in range(3)
    ]
    return [*shapes, (131, 50257, (768, 1600))]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("scheme", IN_KERNEL)
@pytest.mark.parametrize("shape", draw_shapes(), ids=str)
def test_loss_and_gradients_match_fp64(
    shape: tuple[int, int, tuple[int, int]], scheme: str, dtype: torch.dtype
) -> None:
    limit = LIMITS[dtype]
    mixes = [(0.0, 1.0), (0.3, 1.0), (0.7, 2.0), (1.0, 4.0), (1.0, 0.7)]
    # fp16 gradients are for a loss scaler, which is what keeps them from underflowing
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    for number, (alpha, temperature) in enumerate(mixes):
        mix = Mix(alpha, temperature, scheme)
        case = Case(*shape, dtype, padding=47 * (number % 2), bias=number % 3 == 0, seed=number)
        output = case.fused(mix, chunk_tokens=64)
        grad_hidden, grad_head = case.gradients(output.loss * scale)
        loss, expected_hidden, expected_head = case.reference(mix)
        assert output.ce.isnan() == (alpha == 1.0)
        assert output.kd.isnan() == (alpha == 0.0)
        assert grad_hidden.dtype == dtype
        assert grad_head.dtype == torch.float32
        found = (
            error(output.loss.detach(), loss),
            error(grad_hidden, expected_hidden * scale),
            error(grad_head, expected_head * scale),
        )
        print(f"{dtype} {shape} {mix} loss {found[0]:.1e} dH {found[1]:.1e} dW {found[2]:.1e}")
        assert max(found) <= limit, (mix, found)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("scheme", IN_KERNEL)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 1.5e-2)])
def test_logits_far_from_zero_keep_their_digits(
    dtype: torch.dtype, limit: float, scheme: str
) -> None:
    """GPT-2's logits lie near -60, some constant away from a fresh student's.

    Sums near 60 cost fp32 products a digit; logits kept in bf16 would be off by 4e-2 here.
    """
    case = Case(70, 20011, (64, 96), dtype)
    case.t_hidden[:, 0] = 4.0
    case.t_head[:, 0] = -15.0
    mix = Mix(1.0, 2.0, scheme)
    output = case.fused(mix)
    loss, expected_hidden, expected_head = case.reference(mix)
    found = (output.loss.detach(), *case.gradients(output.loss))
    errors = [
        error(one, other)
        for one, other in zip(found, (loss, expected_hidden, expected_head), strict=True)
    ]
    print(f"{dtype} {scheme} errors {errors}")
    assert max(errors) <= limit


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("scheme", IN_KERNEL)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_agrees_with_the_plain_path(scheme: str, alpha: float) -> None:
    case = Case(200, 5003, (96, 160), torch.float32, padding=5, bias=True)
    mix = Mix(alpha, 1.7, scheme)
    fused = case.fused(mix)
    operands = (case.hidden, case.head, case.t_hidden, case.t_head, case.labels, mix)
    plain = distill.distill_loss(*operands, teacher_bias=case.t_bias)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6, equal_nan=True)
    for one, other in zip(case.gradients(fused.loss), case.gradients(plain.loss), strict=True):
        assert error(one, other.double()) <= 1e-5


@needs_gpu
@pytest.mark.gpu
def test_no_step_waits_for_the_device_and_schedules_do_not_recompile() -> None:
    from trainer.loss.kernel import _loss_and_gradient

    case = Case(100, 1003, (64, 96), torch.bfloat16)
    case.gradients(case.fused(Mix(0.5, 2.0)).loss)
    compiled = _loss_and_gradient.device_caches[torch.cuda.current_device()][0]
    before = len(compiled)
    assert before > 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for alpha, temperature in ((0.9, 4.0), (0.25, 3.0), (0.125, 0.5)):
            case.gradients(case.fused(Mix(alpha, temperature)).loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(compiled) == before


@needs_gpu
@pytest.mark.gpu
def test_extra_memory_is_below_one_gibibyte() -> None:
    case = Case(16384, 50257, (768, 1600), torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = case.gradients(case.fused(Mix(0.5, 2.0)).loss)
    extra = torch.cuda.max_memory_allocated() - before
    assert all(bool(grad.isfinite().all()) for grad in grads)
    print(f"extra memory {extra / 2**30:.3f} GiB")
    assert extra <= 1 << 30


@needs_gpu
@pytest.mark.gpu
def test_loss_scaling_reaches_fp16_gradients_before_they_underflow() -> None:
    case = Case(500, 1003, (64, 96), torch.float16)
    mix = Mix(0.5, 2.0)
    scale = 1024.0
    grad_hidden, grad_head = case.gradients(case.fused(mix).loss * scale)
    _, expected_hidden, expected_head = case.reference(mix)
    assert error(grad_hidden, expected_hidden * scale) <= 2e-3
    assert error(grad_head, expected_head * scale) <= 2e-3


@needs_gpu
@pytest.mark.gpu
def test_autocast_changes_nothing() -> None:
    case = Case(60, 301, (64, 96), torch.float32)
    mix = Mix(0.5, 2.0)
    expected = case.gradients(case.fused(mix).loss)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = case.gradients(case.fused(mix).loss)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@needs_gpu
@pytest.mark.gpu
def test_only_the_gradients_asked_for_are_computed() -> None:
    case = Case(60, 301, (64, 96), torch.float32)
    mix = Mix(0.5, 2.0)
    grad_hidden, grad_head = case.gradients(case.fused(mix).loss)
    case.head.requires_grad_(False)
    (hidden_alone,) = torch.autograd.grad(case.fused(mix).loss, (case.hidden,))
    assert torch.equal(hidden_alone, grad_hidden)
    case.head.requires_grad_(True)
    case.hidden.requires_grad_(False)
    (head_alone,) = torch.autograd.grad(case.fused(mix).loss, (case.head,))
    assert torch.equal(head_alone, grad_head)
    case.head.requires_grad_(False)
    assert not case.fused(mix).loss.requires_grad


@needs_gpu
@pytest.mark.gpu
def test_labels_at_both_ends_of_the_vocabulary() -> None:
    case = Case(8, 4097, (64, 96), torch.float32)
    case.labels = torch.tensor([0, 1, 4095, 4096] * 2, device="cuda")
    mix = Mix(0.2, 2.0)
    output = case.fused(mix)
    loss, expected_hidden, expected_head = case.reference(mix)
    grad_hidden, grad_head = case.gradients(output.loss)
    assert error(output.loss.detach(), loss) <= 1e-5
    assert error(grad_hidden, expected_hidden) <= 1e-5
    assert error(grad_head, expected_head) <= 1e-5


def test_operands_on_the_cpu_are_left_to_the_plain_path() -> None:
    case = Case(4, 11, (8, 8), torch.float32, device="cpu")
    mix = Mix(0.5, 2.0)
    assert not fused_loss.usable(case.hidden, case.head, case.t_hidden, case.t_head, mix)
    assert not fused_loss.usable(case.hidden, case.head, None, None, Mix(0.0, 1.0))


def test_operands_that_do_not_fit_are_refused() -> None:
    case = Case(4, 11, (8, 8), torch.float32, device="cpu")
    operands = (case.hidden, case.head, case.t_hidden, case.t_head[:-1])
    with pytest.raises(ValueError, match="teacher's vocabulary of 10 is smaller"):
        fused_loss.distill_loss(*operands, case.labels, Mix(0.5, 2.0))
    with pytest.raises(ValueError, match="teacher's hidden state is needed"):
        fused_loss.distill_loss(*operands[:2], None, None, case.labels, Mix(0.5, 2.0))
    with pytest.raises(ValueError, match=r"\[3\] labels for 4 tokens"):
        fused_loss.distill_loss(*operands, case.labels[:3], Mix(0.0, 1.0))


def sparse_targets(case: Case, temperature: float, entries: int) -> SparseTargets:
    """The teacher's largest probabilities, some of them for ids that are not used."""
    logits = case.t_hidden.float() @ case.t_head[: case.vocabulary].float().T
    log_p = F.log_softmax(logits / temperature, -1)
    weights, ids = log_p.exp().topk(entries)
    weights[:, 1::3] = 0.0
    ids[:, 1::3] = ids[:, :1]
    return SparseTargets(ids.int(), weights * 1.3, (log_p.exp() * log_p).sum(-1))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
@pytest.mark.parametrize("shape", draw_shapes(), ids=str)
def test_the_sparse_loss_matches_fp64(
    shape: tuple[int, int, tuple[int, int]], alpha: float, temperature: float, dtype: torch.dtype
) -> None:
    case, mix = Case(*shape, dtype, seed=3), Mix(alpha, temperature)
    targets = sparse_targets(case, temperature, 28)
    case.labels[::2] = targets.ids[::2, 0].long()  # an id that is the label too
    hidden, head = (part.detach().double().requires_grad_() for part in (case.hidden, case.head))
    expected = sparse_distill_loss(
        hidden,
        head,
        SparseTargets(targets.ids, targets.weights.double(), targets.negentropy.double()),
        case.labels,
        mix,
    )
    # As the loss scaler does, so that fp16 holds the gradients
    scale = 2.0**14 if dtype == torch.float16 else 1.0
    wanted = torch.autograd.grad(scale * expected.loss, (hidden, head))
    found = fused_loss.sparse_distill_loss(
        case.hidden, case.head, targets, case.labels, mix, chunk_tokens=70
    )
    limit = LIMITS[dtype]
    assert float(found.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=limit)
    assert float(found.kd) == pytest.approx(float(expected.kd), rel=limit, abs=limit)
    for ours, theirs in zip(case.gradients(scale * found.loss), wanted, strict=True):
        assert error(ours, theirs) <= 2 * limit


@needs_gpu
@pytest.mark.gpu
def test_at_alpha_0_the_sparse_loss_is_cross_entropy() -> None:
    case = Case(50, 1000, (64, 64), torch.bfloat16)
    found = fused_loss.sparse_distill_loss(case.hidden, case.head, None, case.labels, Mix(0.0, 2.0))
    expected = case.fused(Mix(0.0, 2.0))
    assert torch.equal(found.loss, expected.loss)
    for ours, theirs in zip(case.gradients(found.loss), case.gradients(expected.loss), strict=True):
        assert torch.equal(ours, theirs)
