"""Making targets: what they hold, who makes them, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer import teacher_targets
from trainer.data.streams import TokenStreams, open_streams
from trainer.models.teacher import Teacher, load_teacher, read_teacher_spec
from trainer.runtime.errors import DataError, LiquidError, ModelError, StorageError, UsageError
from trainer.settings.config import TargetSettings, TrainConfig
from trainer.storage.base import Location, StorageConflictError
from trainer.storage.places import open_location
from trainer.targets import making
from trainer.targets.shards import Index, read_index
from trainer.training.evaluation import Evaluator
from trainer.training.precision import Precision

CPU = torch.device("cpu")


def contents(uri: str | Path) -> dict[str, bytes]:
    location = open_location(str(uri))
    return {e.name: location.read_bytes(e.name, limit=1 << 24) for e in location.list()}


def generations(uri: str | Path) -> dict[str, int]:
    return {entry.name: entry.generation for entry in open_location(str(uri)).list()}


def place(uri: str) -> Location:
    """Where what is there may be replaced."""
    location = open_location(uri)
    location.list()
    return location


@pytest.fixture
def streams(tokens_dir: Path) -> TokenStreams:
    return open_streams(tokens_dir)


@pytest.fixture
def teacher(teacher_dir: Path) -> Teacher:
    return load_teacher(read_teacher_spec(str(teacher_dir)), dtype=torch.float32, device=CPU)


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, a teacher that is loaded fails the test."""

    def refuse(*_: object) -> None:
        raise AssertionError("the teacher is loaded")

    return lambda: monkeypatch.setattr(teacher_targets, "prepared_teacher", refuse)


def test_every_place_has_the_record_of_its_own_context(
    several_shards: Path, streams: TokenStreams, teacher: Teacher
) -> None:
    """Whole windows and the shorter last one, against the teacher's own logits of each."""
    made = read_index(str(several_shards)).made
    assert (made.places, made.shards, made.windows) == (len(streams.train) - 1, 4, 132)
    assert made.places % 64, "the last window is a shorter one"
    seen = 0
    for number in range(made.shards):
        data = (several_shards / f"train-{number:05}.bin").read_bytes()
        for window in made.windows_of(number):
            places = made.places_of(window)
            size = len(places) * made.record_bytes
            records, checksum, data = data[:size], data[size : size + 4], data[size + 4 :]
            assert made.checksum(window, records) == checksum
            rows = torch.frombuffer(bytearray(records), dtype=torch.uint8).view(-1, 64)
            tokens = torch.from_numpy(
                streams.train[places.start : places.stop + 1].astype(np.int64)
            )
            logits = teacher.model(input_ids=tokens[None, :-1]).logits[0, :, : made.vocabulary]
            log_p = logits.log_softmax(-1)
            expected = log_p.gather(1, tokens[1:, None])[:, 0]
            found = made.layout.label_log_probs(rows)
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
            for temperature in made.temperatures:
                p = (logits / temperature).softmax(-1)
                targets = made.layout.decode(rows, temperature)
                weights = targets.weights.sum(1)
                assert float(weights.mean()) == pytest.approx(1.0, abs=0.15)
                negentropy = (p * p.log()).sum(1)
                torch.testing.assert_close(targets.negentropy, negentropy, atol=2e-3, rtol=0)
            seen += len(places)
        assert not data
    assert seen == made.places


def test_estimates_over_many_seeds_come_to_the_distribution(
    streams: TokenStreams, teacher: Teacher, several_shards: Path
) -> None:
    """Offsets that depended on the place in a wrong way would show as a bias here."""
    made = read_index(str(several_shards)).made
    total = torch.zeros(64, made.vocabulary, dtype=torch.float64)
    seeds = 50
    for seed in range(seeds):
        scribe = making._Scribe(teacher, replace(made, seed=seed))
        rows = scribe._records(streams.train, 1, 1)[0][0]
        targets = made.layout.decode(rows, 1.5)
        total.scatter_add_(1, targets.ids.long(), targets.weights.double())
    tokens = torch.from_numpy(streams.train[64:128].astype(np.int64))
    logits = teacher.model(input_ids=tokens[None]).logits[0, :, : made.vocabulary]
    p = (logits / 1.5).softmax(-1).double()
    # With K entries the deviation of an estimate is at most about sqrt(p / K)
    deviation = (p / made.layout.places / seeds).sqrt().clamp(min=1e-4)
    errors = (total / seeds - p) / deviation
    assert 0.3 < float(errors.square().mean()) < 1.3
    assert float(errors.abs().max()) < 20.0, "of what is drawn once in fifty times, one is much"


def test_validation_losses_are_those_of_an_evaluation(
    several_shards: Path, streams: TokenStreams, teacher: Teacher, config: TrainConfig
) -> None:
    made = read_index(str(several_shards)).made
    stored = np.frombuffer((several_shards / "validation.bin").read_bytes(), dtype="<f4")
    stored = stored.reshape(len(made.contexts), -1)
    assert made.contexts == (16, 32, 64)
    for limit in (0, 100):
        whole = replace(config, block_size=64, eval_max_tokens=limit)
        evaluator = Evaluator(whole, streams, teacher, Precision(CPU, torch.float32, torch.float32))
        for context, row in zip(made.contexts, stored, strict=True):
            expected = evaluator.teacher_loss(context, made.vocabulary)
            assert -row[: limit or None].mean(dtype=np.float64) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_any_number_of_workers_makes_the_same_bytes(
    workers: int,
    several_shards: Path,
    config: TrainConfig,
    two_temperatures: TargetSettings,
    tmp_path: Path,
) -> None:
    """Each at a place of its own, in any order; with seven of them, three have nothing to do."""
    places = [str(tmp_path / f"worker-{number}") for number in range(workers)]
    for number in reversed(range(workers)):
        own = replace(two_temperatures, workers=workers, worker=number)
        assert teacher_targets.run(config, own, places[number]) is None
    index = teacher_targets.join_places(str(tmp_path / "joined"), places)
    assert index == read_index(str(tmp_path / "joined"))
    assert index.fingerprint == read_index(str(several_shards)).fingerprint
    made = {name: data for at in places if Path(at).exists() for name, data in contents(at).items()}
    expected = contents(several_shards)
    del expected["targets.json"]
    assert made == expected


def test_a_whole_one_is_left_as_it_is_and_needs_no_teacher(
    config: TrainConfig,
    two_temperatures: TargetSettings,
    output: str,
    no_teacher: Callable[[], None],
    several_shards: Path,
) -> None:
    first = teacher_targets.run(config, two_temperatures, output)
    assert isinstance(first, Index)
    expected = {**contents(several_shards), "targets.json": b""}
    assert {**contents(output), "targets.json": b""} == expected
    before = generations(output)
    no_teacher()
    assert teacher_targets.run(config, two_temperatures, output) == first
    assert generations(output) == before


def test_what_is_missing_is_made_and_nothing_else(
    targets: Path, several_shards: Path, config: TrainConfig, two_temperatures: TargetSettings
) -> None:
    """A shard counts once its description is there, which comes last."""
    before = generations(targets)
    for name in ("train-00001.json", "train-00003.json", "train-00003.bin", "validation.json"):
        (targets / name).unlink()
    (targets / "train-00001.bin").write_bytes(b"half")
    teacher_targets.run(config, two_temperatures, str(targets))
    assert contents(targets) == contents(several_shards)
    kept = {name for name, generation in generations(targets).items() if before[name] == generation}
    again = {"train-00001", "train-00003", "validation"}
    assert kept == {name for name in before if name.partition(".")[0] not in again}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_bytes": 48}, "record_bytes 48, not 64"),
        ({"target_temperatures": (1.0,)}, r"temperatures \(1.0,\), not \(1.0, 1.5\)"),
        ({"teacher_context": 32}, "teacher_context 32, not 64"),
        ({"seed": 7}, "seed 7, not 42"),
        ({"eval_ctx_lens": (8,)}, r"contexts \(8, 64\), not \(16, 32, 64\)"),
    ],
    ids=str,
)
def test_other_targets_are_left_alone(
    changed: dict[str, object],
    message: str,
    targets: Path,
    config: TrainConfig,
    two_temperatures: TargetSettings,
    no_teacher: Callable[[], None],
) -> None:
    before = generations(targets)
    no_teacher()
    ours = {name: value for name, value in changed.items() if hasattr(config, name)}
    theirs = {name: value for name, value in changed.items() if name not in ours}
    for index in (True, False):
        if not index:
            (targets / "targets.json").unlink()
            del before["targets.json"]
        with pytest.raises(DataError, match=message) as caught:
            teacher_targets.run(
                replace(config, **ours),  # type: ignore[arg-type]
                replace(two_temperatures, **theirs),  # type: ignore[arg-type]
                str(targets),
            )
        assert "\n" not in str(caught.value)
        assert generations(targets) == before


def test_another_teacher_of_the_same_name_is_told(
    targets: Path,
    config: TrainConfig,
    two_temperatures: TargetSettings,
    teacher_dir: Path,
    tmp_path: Path,
) -> None:
    """One bit of its weights is another; a copy under another name is the same teacher."""
    copy = Path(shutil.copytree(teacher_dir, tmp_path / "copy"))
    own = replace(config, teacher_name=str(copy))
    made = read_index(str(targets)).made
    assert teacher_targets.teacher_digest(str(copy)) == made.teacher_digest
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert teacher_targets.teacher_digest(str(copy)) != made.teacher_digest
    with pytest.raises(DataError, match="the targets to be made are not those at"):
        teacher_targets.run(own, two_temperatures, str(targets))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"mine", "holds 'notes.txt', which is none of the targets' files"),
        ("train-00004.bin", b"mine", "holds 'train-00004.bin'"),
        ("tokens.json", b"{}", "holds 'tokens.json'"),
        ("targets.json", b"{", "targets.json does not describe teacher targets"),
        ("train-00002.json", b"[]", "train-00002.json does not describe teacher targets"),
        ("train-00002.bin", b"short", "train-00002.bin is damaged: 5 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_targets_is_refused(
    name: str,
    content: bytes,
    message: str,
    targets: Path,
    config: TrainConfig,
    two_temperatures: TargetSettings,
    no_teacher: Callable[[], None],
) -> None:
    (targets / name).write_bytes(content)
    before = generations(targets)
    no_teacher()
    with pytest.raises(DataError, match=message) as caught:
        teacher_targets.run(config, two_temperatures, str(targets))
    assert "\n" not in str(caught.value)
    assert generations(targets) == before


def test_an_output_that_cannot_be_is_told_before_anything_is_loaded(
    config: TrainConfig, two_temperatures: TargetSettings, tmp_path: Path, gcs_bucket: str
) -> None:
    (tmp_path / "file").write_text("mine")
    config = replace(config, teacher_name="/none", tokens_dir="/none")
    for output, message in (
        (str(tmp_path / "file" / "out"), "a file is in the way"),
        ("/proc/none/out", "writing to '/proc' failed"),
        ("ftp://a/b", "is neither gs://bucket/path nor a local path"),
        (f"{gcs_bucket}-none/out", "does not exist"),
    ):
        with pytest.raises(LiquidError, match=message):
            teacher_targets.run(config, two_temperatures, output)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_workers_of_one_number(
    config: TrainConfig,
    two_temperatures: TargetSettings,
    output: str,
    monkeypatch: pytest.MonkeyPatch,
    several_shards: Path,
) -> None:
    """The second has looked before the first wrote: it ends, and leaves the other's as they are."""
    original = teacher_targets.make

    def after_another(*arguments: object) -> None:
        monkeypatch.setattr(teacher_targets, "make", original)
        teacher_targets.run(config, two_temperatures, output)
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher_targets, "make", after_another)
    with pytest.raises(StorageConflictError, match="was written by another job"):
        teacher_targets.run(config, two_temperatures, output)
    expected = contents(several_shards)
    assert {**contents(output), "targets.json": b""} == {**expected, "targets.json": b""}
    assert read_index(output).fingerprint == read_index(str(several_shards)).fingerprint


def test_a_full_disk_is_one_line_and_leaves_whole_shards(
    config: TrainConfig, two_temperatures: TargetSettings, tmp_path: Path, several_shards: Path
) -> None:
    """On a real file system that is full after two shards; with room again, it goes on."""
    import resource
    import signal

    output = str(tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (several_shards / "train-00000.bin").stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
        with pytest.raises(StorageError, match="writing '.*train-00000.bin' failed: ") as caught:
            teacher_targets.run(config, two_temperatures, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert set(contents(output)) == {"validation.bin", "validation.json"}
    teacher_targets.run(config, two_temperatures, output)
    assert contents(output).keys() == contents(several_shards).keys()


def test_a_teacher_that_is_not_finite(
    several_shards: Path, streams: TokenStreams, teacher: Teacher, tmp_path: Path
) -> None:
    made = read_index(str(several_shards)).made
    teacher.head = teacher.head.clone()
    teacher.head[5] = torch.nan
    for name in ("train-00000.bin", "validation.bin"):
        with pytest.raises(ModelError, match="computes logits that are not finite"):
            making.make(open_location(str(tmp_path / "o")), made, [name], streams, teacher)
    assert contents(tmp_path / "o") == {}


def test_draws_depend_on_seed_and_place_alone_and_are_uniform() -> None:
    whole = making.draws(3, 0, 60_000)
    assert np.array_equal(making.draws(3, 777, 100), whole[:, 777:877])
    assert whole.dtype == np.float32
    assert whole.min() >= 0.0
    assert whole.max() < 1.0
    for other in (making.draws(4, 0, 60_000), making.draws(2**64 - 1, 0, 60_000), whole[::-1]):
        assert abs(np.corrcoef(whole[0], other[0])[0, 1]) < 0.02
    assert abs(np.corrcoef(whole[0, 1:], whole[0, :-1])[0, 1]) < 0.02
    for row in whole:
        counts = np.histogram(row, 100, (0, 1))[0]
        assert ((counts - 600) ** 2 / 600).sum() < 160  # chi-square of 99 degrees, p = 1e-4


# ── joining


def test_a_joined_index_names_files_elsewhere_by_their_whole_path(
    targets: Path, tmp_path: Path, gcs_bucket: str
) -> None:
    remote = f"{gcs_bucket}/part"
    for name in ("train-00001.bin", "train-00001.json"):
        open_location(remote).put(targets / name, name)
        (targets / name).unlink()
    before = read_index(str(targets)).fingerprint
    (targets / "targets.json").unlink()
    index = making.join(str(tmp_path / "index"), [str(targets), remote])
    assert index.fingerprint == before
    described = json.loads((tmp_path / "index" / "targets.json").read_bytes())["files"]
    assert described["train-00000.bin"]["at"] == f"{targets}/train-00000.bin"
    assert described["train-00001.bin"]["at"] == f"{remote}/train-00001.bin"
    index = making.join(str(targets), [str(targets), remote])
    described = json.loads((targets / "targets.json").read_bytes())["files"]
    assert described["train-00000.bin"]["at"] == ""
    assert read_index(str(targets)) == index


def test_a_join_says_what_is_missing_or_differs(targets: Path, tmp_path: Path) -> None:
    (targets / "targets.json").unlink()
    out, other = str(tmp_path / "index"), Path(shutil.copytree(targets, tmp_path / "other"))
    description = json.loads((other / "train-00001.json").read_bytes())
    description["made_with"]["seed"] = 5
    (other / "train-00001.json").write_text(json.dumps(description))
    (targets / "train-00001.json").unlink()
    for places, message in (
        ([targets], "of 5 files 1 are missing, train-00001.bin for one; run their workers"),
        ([targets, other], "train-00001.bin was not made with the same as the others: seed 42, no"),
        ([tmp_path / "none"], "there are no targets in "),
    ):
        with pytest.raises(DataError, match=message) as caught:
            making.join(out, map(str, places))
        assert "\n" not in str(caught.value)
    description["made_with"]["seed"] = 42
    (other / "train-00001.json").write_text(json.dumps(description))
    data = bytearray((other / "train-00001.bin").read_bytes())
    data[1000] ^= 8
    (other / "train-00001.bin").write_bytes(data)
    with pytest.raises(DataError, match="has not the size and CRC32C of its description"):
        making.join(out, [str(targets), str(other)])
    assert not Path(out).exists()


def test_the_index_of_other_targets_is_left_alone(targets: Path, several_shards: Path) -> None:
    content = json.loads((targets / "targets.json").read_bytes())
    content["made_with"]["seed"] = 5
    made = replace(read_index(str(several_shards)).made, seed=5)
    other = Index(made, read_index(str(several_shards)).files)
    (targets / "targets.json").write_bytes(other.dump(str(several_shards)))
    before = generations(targets)
    with pytest.raises(DataError, match="has the index of other targets .seed 5, not 42."):
        making.join(str(targets), [str(targets)])
    assert generations(targets) == before


def test_settings_of_workers_are_checked() -> None:
    for wrong, message in (
        ({"workers": 2}, "--workers=2 needs --worker, from 0 to 1"),
        ({"workers": 2, "worker": 2}, "--worker=2: of --workers=2, 1 is last"),
        ({"worker": -1}, "--worker=-1 must be at least 0"),
        ({"workers": 0}, "--workers=0 must be at least 1"),
        ({"target_bytes": 5000}, "--target_bytes=5000 must be at most 4096"),
        ({"target_temperatures": (0.0,)}, "--target_temperatures=0 must be"),
        ({"target_temperatures": ()}, "--target_temperatures: 0 of them"),
    ):
        with pytest.raises(UsageError, match=message):
            TargetSettings(**wrong)  # type: ignore[arg-type]
