"""Making targets: the teacher goes once over the token streams, and shards are joined.

A shard depends on what the targets are made with and on nothing else: not on who makes it, nor on
which others are there. So a command that was killed goes on behind its last whole shard, and any
number of workers make the same targets. Windows go through the teacher a fixed number at a time,
shard by shard, for a GPU may round a product of another shape in another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.batches import IGNORED, evaluation_batches
from trainer.data.streams import TokenStreams
from trainer.loss.chunked import product
from trainer.models.teacher import Teacher
from trainer.runtime.errors import DataError, ModelError
from trainer.runtime.log import ProgressBar, log
from trainer.runtime.messages import shortened
from trainer.storage.base import Location
from trainer.storage.files import in_home
from trainer.storage.places import check_scheme, is_remote, open_location
from trainer.targets.sampling import draw, empty_logits
from trainer.targets.shards import (
    DESCRIPTION_LIMIT,
    INDEX_LIMIT,
    INDEX_NAME,
    VALIDATION,
    Index,
    MadeWith,
    description_name,
    dump_description,
    parse_description,
    read_index,
    shard_name,
    shard_number,
)

_PASS_TOKENS = 16_384
"""How many go through the teacher at once."""

_GPU_CHUNK, _CPU_CHUNK = 8192, 1024
"""Of how many tokens the logits are there at once."""

_CHECKED_AT_ONCE = 16
"""Files, when shards are joined."""


def make(
    location: Location,
    made: MadeWith,
    names: Sequence[str],
    streams: TokenStreams,
    teacher: Teacher,
) -> None:
    """Write files of the targets; each while the next one is made.

    Args:
        location: where they go, as `missing` has looked at it.
        made: what the targets are made with.
        names: of the files.
        streams: the tokens.
        teacher: on its device.

    Raises:
        ModelError: the teacher computes something that is not finite.
        StorageError: a file cannot be written, or another command has written it meanwhile.
    """
    scribe = _Scribe(teacher, made)
    shards = [number for number in map(shard_number, names) if number is not None]
    windows = sum(len(made.windows_of(number)) for number in shards)
    bar = ProgressBar("making targets", "window", windows)
    try:
        with ThreadPoolExecutor(1, "writing") as thread:
            written: Future[None] | None = None
            for done, name in enumerate(names, start=1):
                content = scribe.content(name, streams, bar)
                if written is not None:
                    written.result()
                written = thread.submit(_write, location, made, name, content)
                log.info("%s is made, %d of %d files", name, done, len(names))
            if written is not None:
                written.result()
    finally:
        bar.close()


def share(made: MadeWith, workers: int, worker: int) -> list[str]:
    """The names of the files that one of several workers makes: of every so many shards one.

    The first worker makes the losses of the validation split too.
    """
    losses = [VALIDATION] if worker == 0 else []
    return [*losses, *(shard_name(number) for number in range(worker, made.shards, workers))]


def _write(location: Location, made: MadeWith, name: str, content: bytes) -> None:
    entry = location.put_bytes(content, name)
    assert entry.crc32c is not None
    location.put_bytes(dump_description(made, name, entry.crc32c), description_name(name))


def missing(location: Location, made: MadeWith, names: Sequence[str]) -> list[str]:
    """Those of some files that are not at a location yet.

    Raises:
        DataError: something else than such targets is there, or one of the files is damaged.
        StorageError: it cannot be listed or read.
    """
    uri = location.uri
    if not is_remote(uri) and Path(uri).is_file():
        raise DataError(f"{uri} is a file; give a new directory for the targets")
    sizes = {entry.name: entry.size for entry in location.list()}
    expected = made.files
    described = {description_name(name): name for name in expected}
    if INDEX_NAME in sizes:
        _check_same(made, read_index(uri).made, uri)
    present = [name for description, name in described.items() if description in sizes]
    own = [name for name in names if description_name(name) in sizes]
    for name in {*own, *present[:1]}:
        data = location.read_bytes(description_name(name), limit=DESCRIPTION_LIMIT)
        _check_same(made, parse_description(data, name, uri)[0], uri)
    if strange := sorted(sizes.keys() - expected.keys() - described.keys() - {INDEX_NAME}):
        raise DataError(
            f"{uri} holds {strange[0]!r}, which is none of the targets' files; give a new directory"
        )
    for name in own:
        if sizes.get(name) != expected[name]:
            raise DataError(
                f"{location.child(name)} is damaged: {sizes.get(name, 'no')} bytes, not"
                f" {expected[name]}; delete {description_name(name)} and it is made again"
            )
    return [name for name in names if name not in own]


def _check_same(made: MadeWith, found: MadeWith, uri: str) -> None:
    if differing := made.differences(found):
        raise DataError(
            f"the targets to be made are not those at {uri}: {shortened('; '.join(differing))};"
            " give a new directory, or the settings of those"
        )


class _Scribe:
    """Turns windows of tokens into records and losses."""

    def __init__(self, teacher: Teacher, made: MadeWith) -> None:
        self.teacher, self.made = teacher, made
        # A product of fp16 numbers is as fast as one of bf16 and keeps three more bits of each
        kind = torch.float32 if teacher.head.dtype == torch.float32 else torch.float16
        self.head = _padded(teacher.head, made.vocabulary).to(kind)
        bias = teacher.bias
        self.bias = None if bias is None else _padded(bias, made.vocabulary).float()
        self.compiled = teacher.device.type == "cuda" and teacher.compiled

    def content(self, name: str, streams: TokenStreams, bar: ProgressBar) -> bytes:
        """Of a file."""
        number = shard_number(name)
        if number is None:
            return self.validation(streams.validation)
        return self.shard(streams.train, number, bar)

    @torch.no_grad()
    def shard(self, stream: np.ndarray, number: int, bar: ProgressBar) -> bytes:
        """The content of a shard, from the training stream ``[tokens]``."""
        made, content = self.made, bytearray()
        windows = made.windows_of(number)
        together = max(1, _PASS_TOKENS // made.teacher_context)
        for first, records in self._passes(stream, windows, together):
            part = range(first, min(first + together, windows.stop))
            for window, rows in zip(part, records, strict=False):
                kept = rows[: len(made.places_of(window))].tobytes()
                content += kept + made.checksum(window, kept)
            bar.update(len(part))
        return bytes(content)

    def _passes(
        self, stream: np.ndarray, windows: range, together: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """First window and records of each pass; while one is taken, the device makes the next."""
        before: tuple[int, _OnItsWay] | None = None
        for first in [*range(windows.start, windows.stop, together), None]:
            made = None
            if first is not None:
                made = first, _OnItsWay(*self._records(stream, first, together))
            if before is not None:
                records, finite = before[1].arrived()
                place = before[0] * self.made.teacher_context
                self._check(finite, f"for tokens {place} to {place + records.shape[:2].numel()}")
                yield before[0], records.numpy()
            before = made

    def _records(self, stream: np.ndarray, first: int, together: int) -> tuple[Tensor, Tensor]:
        """Records ``[together, teacher_context, record_bytes]`` of windows from ``first`` on, and
        whether the teacher's logits are finite; both on the device.

        What lies past the end of the stream is made up.
        """
        made, context = self.made, self.made.teacher_context
        start = first * context
        tokens = np.zeros(together * context + 1, dtype=np.int64)
        piece = stream[start : start + len(tokens)]
        tokens[: len(piece)] = piece
        # On the way before the teacher starts, for which neither then has to wait
        ids = _sent(tokens, self.teacher.device)
        uniform = _sent(draws(made.seed, start, together * context), self.teacher.device)
        hidden = self.teacher.hidden(ids[:-1].view(together, context)).flatten(0, 1)
        records, finite = [], torch.ones((), dtype=torch.bool, device=ids.device)
        for chunk in _chunks(hidden):
            drawn = draw(
                self._logits(hidden[chunk]),
                ids[1:][chunk],
                made.layout,
                uniform[0, chunk],
                compiled=self.compiled,
            )
            finite &= drawn.negentropies.isfinite().all() & drawn.label_log_probs.isfinite().all()
            dither = uniform[1, chunk]
            records.append(made.layout.encode(drawn, dither, compiled=self.compiled))
        return torch.cat(records).view(together, context, -1), finite

    @torch.no_grad()
    def validation(self, stream: np.ndarray) -> bytes:
        """Log-probabilities of the next tokens of a stream, at each context in turn."""
        content = bytearray()
        for context in self.made.contexts:
            batches = evaluation_batches(
                stream, context=context, batch=max(1, _PASS_TOKENS // context)
            )
            for inputs, labels in batches:
                found = self._log_probs(inputs, labels.flatten())
                content += found[labels.flatten() != IGNORED].numpy().astype("<f4").tobytes()
        return bytes(content)

    def _log_probs(self, inputs: Tensor, labels: Tensor) -> Tensor:
        hidden = self.teacher.hidden(inputs.to(self.teacher.device)).flatten(0, 1)
        wanted = labels.to(hidden.device)
        parts = [
            F.cross_entropy(
                self._logits(hidden[chunk])[:, : self.made.vocabulary],
                wanted[chunk],
                ignore_index=IGNORED,
                reduction="none",
            )
            for chunk in _chunks(hidden)
        ]
        losses = torch.cat(parts)
        self._check(losses.isfinite().all(), "over the validation split")
        return -losses.cpu()

    def _logits(self, hidden: Tensor) -> Tensor:
        """``[n, D]`` to logits as `draw` takes them, in fp32, with nothing rounded in between."""
        logits = empty_logits(len(hidden), self.made.vocabulary, torch.float32, hidden.device)
        product(logits, hidden.to(self.head.dtype), self.head.T)
        return logits if self.bias is None else logits.add_(self.bias)

    def _check(self, finite: Tensor, where: str) -> None:
        if not bool(finite):
            raise ModelError(
                f"teacher {self.teacher.spec.name!r} computes logits that are not finite {where};"
                " give another --teacher_precision"
            )


def _sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers on a device, which goes on with what it does meanwhile."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _OnItsWay:
    """Records and their check on the way from the device, which goes on meanwhile."""

    def __init__(self, records: Tensor, finite: Tensor) -> None:
        self._gpu = records.is_cuda
        self._parts = [
            torch.empty(part.shape, dtype=part.dtype, pin_memory=self._gpu).copy_(
                part, non_blocking=True
            )
            for part in (records, finite)
        ]
        if self._gpu:
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> tuple[Tensor, Tensor]:
        """Both on the CPU."""
        if self._gpu:
            self._event.synchronize()
        records, finite = self._parts
        return records, finite


def _padded(rows: Tensor, vocabulary: int) -> Tensor:
    """The first rows, and as many of zeros as whole blocks of logits need."""
    width = empty_logits(0, vocabulary, rows.dtype, rows.device).shape[1]
    padded = rows.new_zeros((width, *rows.shape[1:]))
    padded[:vocabulary] = rows[:vocabulary]
    return padded


def _chunks(hidden: Tensor) -> Iterator[slice]:
    """Of hidden states ``[tokens, D]``."""
    size = _GPU_CHUNK if hidden.is_cuda else _CPU_CHUNK
    return (slice(start, start + size) for start in range(0, len(hidden), size))


def draws(seed: int, first: int, count: int) -> np.ndarray:
    """Random numbers ``[2, count]`` in fp32, at least 0 and below 1, for places from a first on.

    They are a function of seed and place alone: 24 bits each of a place's splitmix64 (Steele et
    al., 2014).
    """
    with np.errstate(over="ignore"):
        start = _mixed(np.array([seed], dtype=np.uint64))
        places = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
        bits = _mixed(start + places * np.uint64(0x9E3779B97F4A7C15))
    parts = np.stack([bits >> np.uint64(40), bits >> np.uint64(16) & np.uint64(0xFFFFFF)])
    return parts.astype(np.float32) * np.float32(2.0**-24)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def join(output: str, places: Iterable[str]) -> Index:
    """Check that the files of all workers are there and whole, and write the index over them.

    Args:
        output: where the index goes.
        places: directories and ``gs://`` prefixes that hold the files; each is taken from the first
            that has it.

    Raises:
        DataError: a file is missing or damaged, they were not made with the same, or the output has
            another index.
        StorageError: something cannot be read or written.
    """
    locations = [open_location(_whole_uri(place)) for place in places]
    names = [{entry.name for entry in location.list()} for location in locations]
    described = [name for there in names for name in there if name.endswith(".json")]
    if not set(described) - {INDEX_NAME}:
        raise DataError(f"there are no targets in {', '.join(at.uri for at in locations)}")

    def holder(name: str) -> Location | None:
        wanted = {name, description_name(name)}
        pairs = zip(locations, names, strict=True)
        return next((location for location, there in pairs if wanted <= there), None)

    made = _first_made(locations, names)
    at = {name: holder(name) for name in made.files}
    absent = [name for name, location in at.items() if location is None]
    if absent:
        raise DataError(
            f"the targets are not whole: of {len(at)} files {len(absent)} are missing, {absent[0]}"
            " for one; run their workers to the end first"
        )
    with ThreadPoolExecutor(_CHECKED_AT_ONCE, "checking") as pool:
        found = [(name, location) for name, location in at.items() if location is not None]
        sums = list(pool.map(lambda pair: _checked(pair[1], pair[0], made), found))
    files = {
        name: (location.child(name), crc32c)
        for (name, location), crc32c in zip(found, sums, strict=True)
    }
    index = Index(made, files)
    _write_index(index, _whole_uri(output))
    return index


def _whole_uri(uri: str) -> str:
    """A ``gs://`` URI as it is, a local path from the root on.

    Raises:
        UsageError: it is neither.
    """
    check_scheme(uri)
    return uri if is_remote(uri) else str(Path(in_home(uri)).resolve())


def _first_made(locations: Sequence[Location], names: Sequence[set[str]]) -> MadeWith:
    """What the first file that is described was made with."""
    for location, there in zip(locations, names, strict=True):
        for description in sorted(there - {INDEX_NAME}):
            if description.endswith(".json"):
                data = location.read_bytes(description, limit=DESCRIPTION_LIMIT)
                name = description.removesuffix(".json") + ".bin"
                return parse_description(data, name, location.uri)[0]
    raise AssertionError("there is one")


def _checked(location: Location, name: str, made: MadeWith) -> str:
    """The CRC32C of a file, which is as long as it should be and made with the same.

    Raises:
        DataError: it is not.
    """
    data = location.read_bytes(description_name(name), limit=DESCRIPTION_LIMIT)
    found, crc32c = parse_description(data, name, location.uri)
    if differing := made.differences(found):
        raise DataError(
            f"{location.child(name)} was not made with the same as the others:"
            f" {shortened('; '.join(differing))}; join targets of one kind"
        )
    entry = location.stat(name, checksum=True)
    if (entry.size, entry.crc32c) != (made.files[name], crc32c):
        raise DataError(
            f"{location.child(name)} is damaged: it has not the size and CRC32C of its description;"
            f" delete {description_name(name)} and run its worker again"
        )
    return crc32c


def _write_index(index: Index, output: str) -> None:
    location = open_location(output)
    data = index.dump(output)
    if len(data) > INDEX_LIMIT:
        raise DataError(f"the index would have {len(data)} bytes; give shorter places to join")
    if INDEX_NAME in {entry.name for entry in location.list()}:
        before = read_index(output)
        if before.fingerprint != index.fingerprint:
            differing = shortened("; ".join(before.made.differences(index.made))) or "other content"
            raise DataError(
                f"{output} has the index of other targets ({differing}); give a new directory, or"
                " delete it"
            )
        if before == index:
            return
    location.put_bytes(data, INDEX_NAME)
