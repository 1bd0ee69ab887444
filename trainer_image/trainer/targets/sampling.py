"""Drawing a few entries of a distribution so that every estimate from them is unbiased.

For K entries, c is found with Σ min(s / c, 1) = K over the probabilities s of all ids. Those with
s ≥ c are kept; of the others each is drawn with probability s / c, systematically: one random
number decides on all of them. Dividing an entry's probability by that at which it was included
makes the estimate unbiased, and no unbiased estimate of K entries has a smaller squared error
(Fearnhead & Clifford, 2003, doi:10.1111/1467-9868.00421). What keeps only the largest entries is
biased instead, and trains a student that is worse than with no teacher (Anshumann et al., 2025,
arXiv:2503.16870). Here K depends on how many are kept, since a record holds more drawn entries.

Logits are taken in blocks of the vocabulary. Largest entries are looked for in the blocks with the
largest maxima, and a drawn one first among the sums of blocks, then within its block; so only one
pass goes over all of a token's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from trainer.targets.records import LOWEST, Drawn, Layout, constant

BLOCK = 64
"""Ids of a block."""

_FAR_BELOW = -1e4
"""In place of -inf, relative to the largest logit: its exponential is 0, a product with it too."""


@torch.no_grad()
def draw(
    logits: Tensor, labels: Tensor, layout: Layout, offsets: Tensor, *, compiled: bool = False
) -> Drawn:
    """Entries for ``N`` predicted tokens.

    Args:
        logits: the teacher's, ``[N, V]``, or as `empty_logits` made room for them: the latter are
            written over.
        labels: ``[N]``, the true next tokens.
        layout: says how many entries, and for which temperatures.
        offsets: ``[N]`` numbers in [0, 1); uniform ones make the estimates unbiased.
        compiled: use `torch.compile`, for which ``N`` should be the same in every call.

    All is computed in fp32, or in fp64 if the logits are. Logits that are not finite give log-
    probabilities and negentropies that are not.
    """
    if logits.shape[1] == layout.vocabulary:
        padded = empty_logits(len(logits), layout.vocabulary, logits.dtype, logits.device)
        padded[:, : layout.vocabulary] = logits
        logits = padded
    logits[:, layout.vocabulary :] = -torch.inf
    own = _Blocks.of(logits, layout, compiled)
    label_log_probs = own.log_probs(logits.gather(1, labels[:, None]))[:, 0]
    if layout.drawn_beside[-1] == 0:
        ids, log_probs, kept, level = _everything(own, layout)
    else:
        ids, log_probs, kept, level = _kept_and_drawn(own, layout, offsets.to(own.top.dtype))
    return Drawn(ids, log_probs, kept, level, own.log_partitions, own.negentropies, label_log_probs)


def empty_logits(tokens: int, vocabulary: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized ``[tokens, ≥ vocabulary]``, whole blocks, which `draw` needs not copy."""
    width = -(-vocabulary // BLOCK) * BLOCK
    return torch.empty((tokens, width), dtype=kind, device=device)


def _kept_and_drawn(
    own: _Blocks, layout: Layout, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and log-probabilities ``[N, places]``, how many are kept, and the level ``[N]``."""
    largest = _Largest.of(own, layout)
    drawn = _drawn_ids(own, largest, layout, offsets)
    place = torch.arange(layout.places, device=drawn.device)
    at = place.clamp(max=largest.ids.shape[1] - 1).expand_as(drawn)
    is_kept = place < largest.kept[:, None]
    ids = torch.where(is_kept, largest.ids.gather(1, at), drawn)
    # Those that are kept have been taken out of the logits
    others = own.logits.flatten(1).gather(1, drawn)
    log_probs = own.log_probs(torch.where(is_kept, largest.logits.gather(1, at), others))
    level = layout.reference * largest.threshold.log() - own.log_sum
    return ids, log_probs, largest.kept, level


@dataclass
class _Blocks:
    """Logits in blocks, with what a pass over them tells."""

    logits: Tensor
    """``[N, blocks, BLOCK]``; past the vocabulary, and where an entry was kept, -inf."""
    maxima: Tensor
    """``[N, blocks]``."""
    top: Tensor
    """``[N]``: the largest logit."""
    sums: Tensor
    """``[N, blocks]``: of scores, which are exp((logit - top) / reference)."""
    log_sum: Tensor
    """``[N]``: log Σ exp(logit - top)."""
    log_partitions: Tensor
    negentropies: Tensor
    reference: float

    @classmethod
    def of(cls, logits: Tensor, layout: Layout, compiled: bool) -> _Blocks:
        blocks = logits.unflatten(1, (-1, BLOCK))
        statistics = _compiled_statistics() if compiled else _statistics
        maxima, top, sums, log_sum, log_partitions, negentropies = statistics(
            blocks, layout.temperatures, layout.reference
        )
        return cls(
            blocks, maxima, top, sums, log_sum, log_partitions, negentropies, layout.reference
        )

    def log_probs(self, logits: Tensor) -> Tensor:
        """Of logits ``[N, M]``, at temperature 1."""
        return logits.to(self.top.dtype) - (self.top + self.log_sum)[:, None]

    def scores(self, logits: Tensor) -> Tensor:
        """Of logits ``[N, …]``."""
        top = self.top.view(-1, *[1] * (logits.ndim - 1))
        return torch.exp((logits.to(top.dtype) - top) / self.reference)

    def gathered(self, blocks: Tensor) -> Tensor:
        """The logits ``[N, M, BLOCK]`` of blocks ``[N, M]``."""
        return self.logits.gather(1, blocks[:, :, None].expand(-1, -1, BLOCK))


def _statistics(
    blocks: Tensor, temperatures: tuple[float, ...], reference: float
) -> tuple[Tensor, ...]:
    """Maxima of blocks, the largest logit, sums of scores by block, log Σ exp(logit - top),
    log-partitions and negentropies."""
    kind = torch.promote_types(blocks.dtype, torch.float32)
    maxima = blocks.amax(-1)
    # Each block beside its own maximum, so that one pass does; a long sum loses no digits either
    own = maxima.to(kind).clamp(min=torch.finfo(kind).min)
    below = (blocks.to(kind) - own[:, :, None]).clamp(min=_FAR_BELOW)
    powers = {t: torch.exp(below / t) for t in {1.0, reference, *temperatures}}
    sums = {t: values.sum(-1) for t, values in powers.items()}
    weighted = [(powers[t] * below).sum(-1) for t in temperatures]
    top = own.amax(-1)
    beside = (own - top[:, None]).clamp(min=_FAR_BELOW)
    sums = {t: value * torch.exp(beside / t) for t, value in sums.items()}
    log_sum = sums[1.0].sum(-1).log()
    log_partitions, negentropies = [], []
    for temperature, part in zip(temperatures, weighted, strict=True):
        total = sums[temperature].sum(-1)
        # Of a block beside the largest logit
        part = part * torch.exp(beside / temperature) + sums[temperature] * beside
        log_partitions.append(total.log() - log_sum / temperature)
        negentropies.append(part.sum(-1) / temperature / total - total.log())
    found = torch.stack(log_partitions, 1), torch.stack(negentropies, 1)
    return maxima, top, sums[reference], log_sum, *found


@cache
def _compiled_statistics() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_statistics, dynamic=False)


@dataclass
class _Largest:
    """The largest entries, and how many of them are kept."""

    ids: Tensor
    """``[N, K]``."""
    logits: Tensor
    """``[N, K]``: theirs."""
    kept: Tensor
    """``[N]``."""
    threshold: Tensor
    """``[N]``: c, in the unit of scores."""
    drawn: Tensor
    """``[N]``: how many entries are drawn beside them."""

    @classmethod
    def of(cls, own: _Blocks, layout: Layout) -> _Largest:
        """Also takes the entries that are kept out of ``own``: their scores become 0."""
        drawn_beside = constant(layout.drawn_beside, own.top.device)
        most = len(drawn_beside)
        chosen = own.maxima.topk(min(most, own.maxima.shape[1])).indices
        values, places = own.gathered(chosen).flatten(1).topk(most)
        ids = chosen.gather(1, places // BLOCK) * BLOCK + places % BLOCK
        scores = own.scores(values)
        # With k entries kept, c is the mass of the others over the places left for them
        mass = own.sums.sum(-1, keepdim=True) - (scores.cumsum(-1) - scores)
        fits = scores <= mass / drawn_beside
        fits[:, -1] = True  # it does: one place is left, and only rounding can say otherwise
        kept = fits.int().argmax(-1, keepdim=True)
        is_kept = torch.arange(most, device=ids.device) < kept
        own.logits.flatten(1).scatter_(1, ids, values.masked_fill(is_kept, -torch.inf))
        touched = ids // BLOCK
        own.sums.scatter_(1, touched, own.scores(own.gathered(touched)).sum(-1))
        drawn = drawn_beside[kept]
        threshold = torch.maximum(own.sums.cumsum(-1)[:, -1:] / drawn, scores.gather(1, kept))
        return cls(ids, values, kept[:, 0], threshold[:, 0], drawn[:, 0])


def _drawn_ids(own: _Blocks, largest: _Largest, layout: Layout, offsets: Tensor) -> Tensor:
    """``[N, places]``: ids of drawn entries in their places behind those that are kept."""
    place = torch.arange(layout.places, device=own.top.device)
    number = (place - largest.kept[:, None]).clamp(min=0)
    # One is drawn wherever the running sum of scores passes a multiple of c less the offset
    running = own.sums.cumsum(-1)
    tick = (number + 1.0 - offsets[:, None]) * largest.threshold[:, None]
    total = running[:, -1:]
    used = (number < largest.drawn[:, None]) & (tick <= total * (1.0 + 1e-5))
    tick = torch.minimum(tick, total)
    block = torch.searchsorted(running, tick).clamp(max=running.shape[1] - 1)
    before = running.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    inside = own.scores(own.gathered(block)).cumsum(-1)
    rest = torch.minimum(tick - before, inside[:, :, -1])
    ids = block * BLOCK + (inside < rest[:, :, None]).sum(-1)
    # An unused place repeats the id before it
    last_kept = largest.ids.gather(1, (largest.kept[:, None] - 1).clamp(min=0))
    ids = ids.masked_fill(~used, -1).cummax(-1).values
    return torch.where(ids < 0, last_kept, ids)


def _everything(own: _Blocks, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_kept_and_drawn`, where a record holds all ids."""
    logits = own.logits.flatten(1)[:, : layout.vocabulary]
    every = torch.arange(layout.vocabulary, device=logits.device).expand(len(logits), -1)
    kept = torch.full_like(every[:, 0], layout.vocabulary)
    return every, own.log_probs(logits), kept, torch.full_like(own.top, LOWEST)
