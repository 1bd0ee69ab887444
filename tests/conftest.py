"""What the tests share: a real object server, a small real corpus, tokenizer and teachers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from pipelines import embedded
from tests.faults.proxy import FaultProxy
from tests.faults.server import ObjectServer
from tests.trainer.samples import save_teacher
from trainer import entrypoint, export_hf, prepare_tokens, teacher_targets
from trainer.runtime.log import FORMAT, JSON, log, quiet_libraries
from trainer.runtime.signals import release_signals

os.environ[FORMAT] = JSON
"""What commands say is read by the tests, also of those that they start."""
_numbers = itertools.count(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long forms out unless `-m` names them."""
    if "soak" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@contextlib.contextmanager
def log_as_it_was() -> Iterator[None]:
    """A command called in process sets up log and signals; the next test has another stderr.

    So does one that a fixture of a whole module calls: its handler is not this test's.
    """
    level, hook, on_sigterm = log.level, sys.excepthook, signal.getsignal(signal.SIGTERM)
    log.handlers[:], log.propagate = [], True
    try:
        yield
    finally:
        release_signals()
        log.handlers[:], log.propagate, sys.excepthook = [], True, hook
        log.setLevel(level)
        signal.signal(signal.SIGTERM, on_sigterm)


@pytest.fixture(autouse=True)
def _log_of_one_test() -> Iterator[None]:
    with log_as_it_was():
        yield


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """fake-gcs-server, for the whole session."""
    server = ObjectServer(tmp_path_factory.mktemp("object-server"))
    yield server
    server.close()


@pytest.fixture
def gcs_proxy(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The way to the server that clients of this test and its subprocesses take.

    Injects nothing until its `faults` or `bandwidth` are set.
    """
    with FaultProxy(object_server.url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@pytest.fixture
def gcs_bucket(gcs_proxy: FaultProxy, object_server: ObjectServer) -> str:
    """The URI of a new, empty bucket."""
    name = f"bucket-{next(_numbers)}"
    object_server.make_bucket(name)
    return f"gs://{name}"


if "PYTEST_XDIST_WORKER" in os.environ:
    # The cores are shared: threads of several trainings would wait for one another, busily
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [text for _, text in sorted(topics.items())][:48]


@pytest.fixture(scope="session")
def corpus(root: Path, texts: list[str]) -> Path:
    """``train.jsonl`` and ``validation.jsonl`` of CPython's language reference."""
    directory = root / "corpus"
    directory.mkdir()
    for name, part in (("train", texts[:-4]), ("validation", texts[-4:])):
        lines = (json.dumps({"text": text}) for text in part)
        (directory / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def tokenizer_dir(root: Path, corpus: Path) -> Path:
    return embedded.build_tokenizer(corpus, root / "tokenizer", vocab_size=512)


@pytest.fixture(scope="session")
def teacher_dir(root: Path, tokenizer_dir: Path) -> Path:
    """512 tokens, 64 positions, a vocabulary padded to 520 rows."""
    return save_teacher(root / "teacher", tokenizer_dir, vocab=520, positions=64)


@pytest.fixture(scope="session")
def tokens_dir(root: Path, texts: list[str], tokenizer_dir: Path) -> Path:
    """Some thousand tokens of the corpus."""
    source = root / "small-corpus"
    source.mkdir()
    for name, part in (("train", texts[:4]), ("validation", texts[-1:])):
        lines = (json.dumps({"text": text}) for text in part)
        (source / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = {"teacher_name": tokenizer_dir, "dataset_name": source, "local_workdir": root / "work"}
    with log_as_it_was():
        prepare_tokens.main([str(root / "tokens"), *(f"--{n}={v}" for n, v in flags.items())])
    return root / "tokens"


@pytest.fixture(scope="session")
def targets_dir(root: Path, tokens_dir: Path, teacher_dir: Path) -> Path:
    """The teacher's targets of these tokens, at its 64 positions and for two temperatures."""
    flags = {
        "teacher_name": teacher_dir,
        "tokens_dir": tokens_dir,
        "local_workdir": root / "work",
        "target_temperatures": "1.0,1.5",
        "eval_ctx_lens": "16,32",
    }
    with log_as_it_was():
        teacher_targets.main([str(root / "targets"), *(f"--{n}={v}" for n, v in flags.items())])
    return root / "targets"


@pytest.fixture
def settings(teacher_dir: Path, corpus: Path, root: Path, tmp_path: Path) -> dict[str, object]:
    """A run of seconds on the CPU, as settings of the command line."""
    return {
        "teacher_name": str(teacher_dir),
        "dataset_name": str(corpus),
        "cache_dir": str(root / "cache"),
        "local_workdir": str(tmp_path / "work"),
        "block_size": 32,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "train_steps": 6,
        "warmup_steps": 2,
        "lr_peak": 1e-3,
        "micro_batch": 4,
        "global_batch": 4,
        "eval_every": 3,
        "save_every": 3,
        "log_interval": 2,
        "eval_max_tokens": 1000,
    }


@pytest.fixture(scope="session")
def trained_teacher(root: Path) -> tuple[Path, Path]:
    """The embedded corpus at a smaller size and a teacher trained on it; returns both."""
    quiet_libraries()
    corpus = embedded.build_corpus(root / "embedded-corpus", limit=1_500_000)
    work = root / "teacher-run"
    tokenizer = embedded.build_tokenizer(corpus, work / "tokenizer", vocab_size=1024)
    flags = embedded.TEACHER_FLAGS | {
        "teacher_name": str(tokenizer),
        "dataset_name": str(corpus),
        "local_workdir": str(work / "run"),
        "cache_dir": str(root / "cache"),
        "d_model": 128,
        "n_layers": 3,
        "n_heads": 4,
        "train_steps": 150,
        "eval_every": 150,
    }
    with log_as_it_was():
        entrypoint.main([f"--{name}={value}" for name, value in flags.items()])
    target = root / "trained-teacher"
    export_hf.run(str(work / "run" / "best.pt"), str(target), tokenizer=str(tokenizer))
    return corpus, target
