"""A record: the stored targets of one predicted token, in a fixed number of bytes.

    true token's log p | level | negentropies | log-partitions | kept | ids … codes

A record's entries are first the teacher's most probable tokens, as many as ``kept`` says, then a
sample of the others; `trainer.targets.sampling` draws them. Ids stand from the front, codes from
the back, so what fewer kept entries leave free holds more drawn ones.

A kept entry's code is its log-probability at temperature 1, in 8 bits. With the log-partition of a
temperature T it gives p_T, for which the entry counts.

A drawn entry was included with probability π, which is its probability at the layout's reference
temperature, divided by a threshold; it counts for p_T / π. The level is the log-probability at
temperature 1 at which π would be 1. Where the layout has one temperature, which then is the
reference, p_T / π is the same for all that were drawn, and they need no code. Otherwise it is how
far the entry's log-probability lies below the level, in 4 bits: little depends on it.

Everything is rounded at random, up or down, so that its expectation, for codes of kept entries that
of the probability, is what was rounded (Gupta et al., 2015, arXiv:1502.02551).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from trainer.loss.sparse import SparseTargets

LOWEST = -24.0
"""Log-probability, in nats, below which a kept entry's is stored as this one: e^-24 is 4e-11."""

LOWEST_LABEL = -64.0
"""The same for the true token, whose log-probability is a loss."""

_DEPTH = 16.0
"""How far below the level a drawn entry's log-probability is told, in nats."""

_MOST_KEPT = 255

_STEPS, _CODES, _NIBBLES = (1 << 16) - 1, (1 << 8) - 1, (1 << 4) - 1
"""Largest fixed-point number, code of a kept and code of a drawn entry."""


@dataclass(frozen=True)
class Drawn:
    """What is stored of ``N`` predicted tokens, before it is rounded."""

    ids: Tensor
    """``[N, places]``: those kept, then those drawn, ascending. A drawn place that repeats the id
    before it is unused."""
    log_probs: Tensor
    """``[N, places]``, at temperature 1."""
    kept: Tensor
    """``[N]``: how many were kept."""
    level: Tensor
    """``[N]``: the log-probability at temperature 1 at which a drawn one would be certain."""
    log_partitions: Tensor
    """``[N, temperatures]``: log Σ p^(1/T)."""
    negentropies: Tensor
    """``[N, temperatures]``: Σ p_T log p_T, in nats."""
    label_log_probs: Tensor
    """``[N]``: log p of the true next token at temperature 1."""


@dataclass(frozen=True)
class Layout:
    """What records hold.

    Raises:
        ValueError: the size holds no entry, or another field is out of its range.
    """

    vocabulary: int
    """Ids are below this; they take 2 bytes up to 65,536, else 4."""
    temperatures: tuple[float, ...]
    """Ascending; the estimates are unbiased at these."""
    record_bytes: int

    def __post_init__(self) -> None:
        if self.vocabulary < 1:
            raise ValueError(f"a vocabulary of {self.vocabulary} has no ids")
        known = self.temperatures
        if not known or list(known) != sorted(set(known)) or not all(1e-3 < t < 1e3 for t in known):
            raise ValueError(
                f"temperatures {known} are not ascending numbers between 0.001 and 1000"
            )
        if not self._holds_all and not self.drawn_beside:
            least = self._front_bytes + 2 * self.id_bytes + 1
            raise ValueError(
                f"{self.record_bytes} bytes are too few for the targets of a token; at least"
                f" {least} are needed for {len(known)} temperatures"
            )

    # ── sizes

    @property
    def reference(self) -> float:
        """The temperature at whose probabilities entries are kept and drawn: between the lowest and
        the highest, their geometric mean."""
        return math.sqrt(self.temperatures[0] * self.temperatures[-1])

    @property
    def id_bytes(self) -> int:
        """Bytes of an id."""
        return 2 if self.vocabulary <= 1 << 16 else 4

    @property
    def _nibbles(self) -> bool:
        """Whether drawn entries have codes."""
        return len(self.temperatures) > 1

    @property
    def _partitioned(self) -> list[int]:
        """Places of the temperatures other than 1, whose partition is 1."""
        return [place for place, value in enumerate(self.temperatures) if value != 1.0]

    @property
    def _front_bytes(self) -> int:
        return 5 + 2 * len(self.temperatures) + 2 * len(self._partitioned)

    @property
    def _room(self) -> int:
        """Bytes of ids and codes."""
        return max(0, self.record_bytes - self._front_bytes)

    @property
    def _holds_all(self) -> bool:
        """Whether the whole vocabulary fits, so that nothing is drawn."""
        return self.vocabulary <= min(_MOST_KEPT, self._room // (self.id_bytes + 1))

    @cached_property
    def drawn_beside(self) -> tuple[int, ...]:
        """By the number of entries kept, from 0 on, how many are drawn beside them."""
        if self._holds_all:
            return (*[0] * (self.vocabulary + 1),)
        half_bytes = 2 * self.id_bytes + self._nibbles
        counts = []
        for kept in range(_MOST_KEPT + 1):
            places = 2 * (self._room - kept * (self.id_bytes + 1)) // half_bytes
            if places < 1:
                break
            counts.append(places)
        # With one place left for the others it can always be given; with more, the next score may
        # be more than its part of what is left
        return (*counts[:-1], 1) if counts else ()

    @property
    def places(self) -> int:
        """Most entries of a record."""
        return max(kept + drawn for kept, drawn in enumerate(self.drawn_beside))

    @cached_property
    def _ranges(self) -> list[tuple[float, float]]:
        """Of each fixed-point number."""
        flat = math.log(max(2, self.vocabulary))
        highest = max(0.0, self.reference - 1.0) * flat
        partitions = [(1.0 - 1.0 / self.temperatures[place]) * flat for place in self._partitioned]
        return [
            (0.0, LOWEST_LABEL),
            (highest, LOWEST),
            *[(0.0, -flat) for _ in self.temperatures],
            *[(0.0, limit) for limit in partitions],
        ]

    # ── writing

    def encode(self, drawn: Drawn, dither: Tensor, *, compiled: bool = False) -> Tensor:
        """Records ``[N, record_bytes]`` in uint8.

        Args:
            drawn: as the layout asks for it.
            dither: ``[N]`` numbers in [0, 1), uniform over the draws, that decide on rounding.
            compiled: use `torch.compile`, for which ``N`` should be the same in every call.
        """
        device = drawn.ids.device
        ends = [constant(end, device, torch.float64) for end in zip(*self._ranges, strict=True)]
        numbers = [
            drawn.label_log_probs,
            drawn.level,
            *drawn.negentropies.unbind(1),
            *(drawn.log_partitions[:, place] for place in self._partitioned),
        ]
        encode = _compiled_encoding() if compiled else Layout._encode
        beside = constant(self.drawn_beside, device)
        return encode(self, drawn, torch.stack(numbers, 1).double(), dither, ends, beside)

    def _encode(
        self,
        drawn: Drawn,
        numbers: Tensor,
        dither: Tensor,
        ends: list[Tensor],
        drawn_beside: Tensor,
    ) -> Tensor:
        tokens, device = numbers.shape[0], numbers.device
        dither = dither.double()[:, None]
        first, last = ends
        shares = ((numbers - first) / (last - first)).clamp(0.0, 1.0)
        header = _rounded(shares * _STEPS, _turned(dither, 0, shares.shape[1]))
        place, kept = torch.arange(self.places, device=device), drawn.kept[:, None]
        used = place < kept + drawn_beside[kept]
        # One column more than a record, for what goes nowhere
        records = torch.zeros((tokens, self.record_bytes + 1), dtype=torch.uint8, device=device)
        front = torch.cat(
            (
                _to_bytes(header, 2),
                kept.to(torch.uint8),
                _to_bytes(drawn.ids.masked_fill(~used, 0), self.id_bytes),
            ),
            1,
        )[:, : self.record_bytes]
        records[:, : front.shape[1]] = front
        codes = self._kept_codes(drawn.log_probs, _turned(dither, 10, self.places))
        at = (self.record_bytes - 1 - place).expand(tokens, -1)
        records.scatter_(1, at.masked_fill(place >= kept, self.record_bytes), codes)
        if self._nibbles:
            below = drawn.level[:, None] - drawn.log_probs
            nibbles = _rounded(
                _NIBBLES * (below.double().clamp(0.0, _DEPTH) / _DEPTH).sqrt(),
                _turned(dither, 300, self.places),
            )
            at, shift = self._nibble_places(kept, place)
            at = at.masked_fill(~used | (place < kept), self.record_bytes)
            # Halves of a byte are written in turn, so none is written over
            for half in (0, 4):
                own = at.masked_fill(shift != half, self.record_bytes)
                both = records.gather(1, own) | (nibbles << half).to(torch.uint8)
                records.scatter_(1, own, both)
        return records[:, : self.record_bytes].contiguous()

    def _kept_codes(self, log_probs: Tensor, dither: Tensor) -> Tensor:
        # The square root makes steps fine where probabilities are large
        place = (log_probs.double().clamp(LOWEST, 0.0) / LOWEST).sqrt() * _CODES
        below = place.floor().clamp(max=_CODES - 1)
        # At the lowest temperature, where the same error of a logarithm changes most
        high, low, wanted = (
            torch.exp(_log_prob(below + step) / self.temperatures[0])
            for step in (0, 1, place - below)
        )
        return (below + (dither < (high - wanted) / (high - low))).to(torch.uint8)

    # ── reading

    def decode(self, records: Tensor, temperature: float) -> SparseTargets:
        """The estimate at one of the temperatures.

        Args:
            records: ``[N, record_bytes]`` in uint8.
            temperature: one of ``temperatures``.

        Raises:
            ValueError: records of another size, or of another temperature.
        """
        if temperature not in self.temperatures:
            raise ValueError(f"temperature {temperature:g} is not among {self.temperatures}")
        at = self.temperatures.index(temperature)
        numbers, kept, ids = self._front(records)
        level = numbers[:, 1:2]
        log_partition = torch.zeros_like(level)
        if temperature != 1.0:
            column = 2 + len(self.temperatures) + self._partitioned.index(at)
            log_partition = numbers[:, column : column + 1]
        place = torch.arange(self.places, device=records.device)
        codes = records[:, -self.places :].flip(1)
        drawn = (level / temperature - log_partition).expand(-1, self.places)
        if self._nibbles:
            byte, shift = self._nibble_places(kept, place)
            nibbles = records.gather(1, byte) >> shift & _NIBBLES
            drawn = drawn + self._beside_level(nibbles.long(), temperature)
        certain = _log_prob(codes.float()) / temperature - log_partition
        log_weights = torch.where(place < kept, certain, drawn)
        used = place < kept + self._drawn_of(kept)
        used[:, 1:] &= ids[:, 1:] != ids[:, :-1]
        weights = torch.where(used, log_weights.exp(), 0.0)
        return SparseTargets(ids.masked_fill(~used, 0), weights, numbers[:, 2 + at].contiguous())

    def _beside_level(self, nibbles: Tensor, temperature: float) -> Tensor:
        """Log of what drawn entries count for, relative to one at the level."""
        slope = 1.0 / temperature - 1.0 / self.reference
        factors = []
        for code in range(_NIBBLES + 1):
            below = _DEPTH * (code / _NIBBLES) ** 2
            # Rounding a logarithm at random makes its exponential larger by a twelfth of the
            # square of the step, here the mean of both sides' squares
            squares = (_DEPTH / _NIBBLES**2) ** 2 * (4.0 * code**2 + 1.0)
            factors.append(-slope * below + math.log1p(-(slope**2) * squares / 12.0))
        return constant(tuple(factors), nibbles.device)[nibbles]

    def label_log_probs(self, records: Tensor) -> Tensor:
        """``[N]``: the true next token's log-probability at temperature 1, in nats."""
        return self._front(records)[0][:, 0]

    def largest_id(self, records: np.ndarray) -> int:
        """Of all entries of ``[N, record_bytes]``; one outside the vocabulary shows that records
        are damaged. NumPy's, for it is called for thousands of windows a second."""
        drawn_beside = np.array(self.drawn_beside)
        kept = np.minimum(records[:, self._front_bytes - 1], len(drawn_beside) - 1)
        content = records[:, self._front_bytes :][:, : self.places * self.id_bytes]
        ids = np.ascontiguousarray(content).view(f"<u{self.id_bytes}")
        used = np.arange(self.places) < (kept + drawn_beside[kept])[:, None]
        return int(ids.max(where=used, initial=0))

    def _front(self, records: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fixed-point numbers ``[N, …]`` in fp32, kept ``[N, 1]``, ids ``[N, places]``."""
        if records.ndim != 2 or records.shape[1] != self.record_bytes:
            raise ValueError(f"records {tuple(records.shape)} are not of {self.record_bytes} bytes")
        front, ids_bytes = self._front_bytes, self.places * self.id_bytes
        first, last = (constant(ends, records.device) for ends in zip(*self._ranges, strict=True))
        numbers = _from_bytes(records[:, : front - 1], 2) / _STEPS * (last - first) + first
        kept = records[:, front - 1 : front].int().clamp(max=len(self.drawn_beside) - 1)
        return numbers, kept, _from_bytes(records[:, front : front + ids_bytes], self.id_bytes)

    def _drawn_of(self, kept: Tensor) -> Tensor:
        return constant(self.drawn_beside, kept.device)[kept.long()]

    def _nibble_places(self, kept: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Byte ``[N, places]`` and shift of drawn entries' codes, behind those of kept ones."""
        number = (place - kept).clamp(min=0)
        byte = (self.record_bytes - 1 - kept - number // 2).clamp(min=0)
        return byte.long(), number % 2 * 4


@lru_cache(256)
def constant(
    numbers: tuple[float, ...], device: torch.device, kind: torch.dtype | None = None
) -> Tensor:
    """Numbers on a device, copied there once: each copy would wait for all that the device does."""
    return torch.tensor(numbers, dtype=kind, device=device)


@cache
def _compiled_encoding() -> Callable[..., Tensor]:
    return torch.compile(Layout._encode, dynamic=False)


def _log_prob(codes: Tensor) -> Tensor:
    """Log-probabilities of codes of kept entries."""
    return LOWEST * (codes / _CODES).square()


def _turned(dither: Tensor, first: int, count: int) -> Tensor:
    """``[N, count]`` other numbers in [0, 1), each uniform as ``dither`` ``[N, 1]`` is."""
    turns = torch.arange(first, first + count, device=dither.device)
    return (dither + turns * 0.6180339887498949) % 1.0


def _rounded(numbers: Tensor, dither: Tensor) -> Tensor:
    return (numbers + dither).floor().long()


def _to_bytes(numbers: Tensor, size: int) -> Tensor:
    """``[N, M]`` whole numbers as ``[N, M · size]`` bytes, the low one first."""
    shifts = torch.arange(0, 8 * size, 8, device=numbers.device)
    return (numbers[:, :, None] >> shifts & 0xFF).to(torch.uint8).flatten(1)


def _from_bytes(content: Tensor, size: int) -> Tensor:
    """``[N, M · size]`` bytes as ``[N, M]`` whole numbers in int32, or int64 for ids of 4 bytes."""
    columns = content.unflatten(1, (-1, size)).to(torch.int32 if size == 2 else torch.int64)
    numbers = columns[:, :, 0]
    for place in range(1, size):
        numbers = numbers | columns[:, :, place] << 8 * place
    return numbers
