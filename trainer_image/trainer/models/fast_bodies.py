"""Fast bodies of frozen teachers. Another family's is a module of its own and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.gpt2 import body as gpt2
from trainer.models.gpt2.fp8_body import GPT2Fp8Body
from trainer.runtime.errors import ModelError


class FastBody(Protocol):
    """Replaces the body of a frozen model."""

    def __call__(self, ids: Tensor) -> Tensor:
        """``[B, L]`` token ids to the last hidden state ``[B, L, D]``, a tensor of the caller's."""

    def release(self) -> None:
        """Give up the buffers kept between calls; the next call makes its own."""


@dataclass(frozen=True)
class Family:
    """Models of one architecture, each loaded in its final type and place."""

    name: str
    supports: Callable[[Any], bool]
    """Whether the bodies below compute what this `transformers` model's body computes."""
    body: Callable[[Any], FastBody]
    """The body of a supported model, in the model's type."""
    fp8_body: Callable[[Any], FastBody] | None = None
    """The body of a supported bf16 model, with products in fp8; the model gives up the weights
    that are copied to fp8. Raises `ModelError` where the model's widths do not allow that."""


FAMILIES: tuple[Family, ...] = (
    Family("GPT-2", gpt2.supports, gpt2.GPT2Body, partial(GPT2Fp8Body, release=True)),
)


def family_of(model: Any) -> Family | None:
    """The family that supports a model; None where there is none."""
    return next((family for family in FAMILIES if family.supports(model)), None)


@dataclass(frozen=True)
class QuantizationError:
    """How far the fp8 body is from the bf16 body of the same model, over some tokens."""

    divergence: float
    """KL(bf16 ‖ fp8) of the next token's distribution at temperature 1, in nats a token."""
    same_choice: float
    """Share of tokens whose most probable next token is the same."""
    hidden: float
    """‖fp8 − bf16‖ / ‖bf16‖ of the last hidden state."""


@torch.no_grad()
def quantize_teacher(
    model: Any, head: Tensor, windows: Tensor
) -> tuple[FastBody, QuantizationError]:
    """The fp8 body of a model, and its error on ``windows`` ``[B, L]`` of token ids.

    Args:
        model: in its final place; it gives up the weights that are copied to fp8.
        head: ``[V, D]``, its output embedding.
        windows: token ids of real text, on the model's device.

    Raises:
        ModelError: there is no fp8 form of such a model.
    """
    family = family_of(model)
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    if family is None or family.fp8_body is None or not bf16:
        names = " or ".join(family.name for family in FAMILIES if family.fp8_body)
        raise ModelError(
            f"{type(model).__name__} has no fp8 form, only {names} in bf16 has; use"
            " --teacher_precision=bf16"
        )
    before = family.body(model)(windows).flatten(0, 1)
    fp8_body = family.fp8_body(model)
    after = fp8_body(windows).flatten(0, 1)
    head = head.float()
    divergence = same = torch.zeros((), device=head.device, dtype=torch.float64)
    for left, right in zip(before.split(1024), after.split(1024), strict=True):
        # In fp32: rounding logits to bf16 would itself change them by as much as fp8 does
        exact, rounded = (F.linear(part.float(), head) for part in (left, right))
        log_p, log_q = exact.log_softmax(1), rounded.log_softmax(1)
        divergence = divergence + (log_p.exp() * (log_p - log_q)).sum(1).double().sum()
        same = same + (exact.argmax(1) == rounded.argmax(1)).double().sum()
    difference = (after.float() - before.float()).norm() / before.float().norm()
    tokens = windows.numel()
    error = QuantizationError(float(divergence) / tokens, float(same) / tokens, float(difference))
    return fp8_body, error
