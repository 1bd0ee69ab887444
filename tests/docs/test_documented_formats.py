"""The tables of ``docs/formats.md`` have the fields that are written."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tests.conftest import log_as_it_was
from tests.docs.markdown import ROOT, spans
from trainer import entrypoint
from trainer.checkpoints.sidecar import Sidecar
from trainer.data.streams import TokenInfo
from trainer.models.student import StudentConfig, expected_shapes
from trainer.targets.records import Layout
from trainer.targets.shards import ESTIMATOR, INDEX_NAME, VALIDATION, Index, MadeWith

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def between(start: str, end: str) -> str:
    assert start in PAGE
    return PAGE.partition(start)[2].partition(end)[0]


def first_column(table: str) -> set[str]:
    """The code in the first cells of a table's rows."""
    rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    return {name for row in rows for name in spans(row)}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, tokens_dir: Path) -> Path:
    """A run of one update, by CE alone."""
    work = tmp_path_factory.mktemp("formats")
    flags = {
        "teacher_name": teacher_dir,
        "tokens_dir": tokens_dir,
        "local_workdir": work,
        "block_size": 32,
        "d_model": 16,
        "n_layers": 1,
        "n_heads": 2,
        "train_steps": 1,
        "alpha": 0,
        "eval_every": 1,
        "global_batch": 8,
        "eval_max_tokens": 100,
    }
    with log_as_it_was():
        entrypoint.main([f"--{name}={value}" for name, value in flags.items()])
    return work


def test_checkpoints(run_dir: Path) -> None:
    payload = torch.load(run_dir / "final.pt", weights_only=True)
    assert first_column(between("## Checkpoints", "**Weights**")) == set(payload)
    metadata = first_column(between("**Metadata**", "A new phase takes"))
    assert metadata == {*payload["meta"], "compiled"}  # that one only where the run compiles
    sidecar = json.loads((run_dir / "final.pt.meta.json").read_text())
    assert set(sidecar) - set(payload["meta"]) == {"file", "size", "crc32c"}
    assert Sidecar.parse((run_dir / "final.pt.meta.json").read_bytes(), "final.pt").step == 1
    assert set(payload["scheduler"]) <= set(spans(between("| `scheduler` |", "\n")))


def test_weights() -> None:
    sizes = {"V": 7, "D": 4, "positions": 5}
    described = {}
    for names, shape in re.findall(
        r"^\| (`.*?) \| \[(.*)\] \|", between("**Weights**", "**Meta"), re.M
    ):
        numbers = [
            [sizes.get(word) or int(word) for word in part.split()] for part in shape.split(",")
        ]
        for name in spans(names):
            described[name.replace("{i}", "0")] = tuple(map(math.prod, numbers))
    assert described == expected_shapes(StudentConfig(7, 4, 1, 1, 5))


def test_token_streams(tokens_dir: Path) -> None:
    section = between("## Token streams", "## Teacher targets")
    written = {path.name for path in tokens_dir.iterdir()}
    assert {name.rstrip("/") for name in first_column(section)} == written
    assert {spec.name for spec in fields(TokenInfo)} <= set(spans(section))


def test_targets(tmp_path: Path) -> None:
    section = between("## Teacher targets", "**A record**")
    made = MadeWith(
        "t", "k", 100, 50, "gpt2", "d", "bf16", 50_257, 8, (1.0,), 64, 1, ESTIMATOR, (8,)
    )
    index = Index(made, {name: (f"{tmp_path}/{name}", "AAAAAA==") for name in made.files})
    content = json.loads(index.dump(str(tmp_path)))
    entry = content["files"][VALIDATION]
    assert {*content, *entry, *made.files, INDEX_NAME} <= set(spans(section))
    named = set(spans(section.partition("`made_with` is all")[2]))
    assert named < {spec.name for spec in fields(MadeWith)}


def test_records() -> None:
    """The bytes before the ids are those that the table adds up to."""
    table = between("**A record**", "The two-byte numbers")
    for temperatures in ((1.0,), (1.0, 1.2), (2.0,)):
        layout = Layout(50_257, temperatures, 64)
        others = [value for value in temperatures if value != 1.0]
        assert layout._front_bytes == 2 + 2 + 2 * len(temperatures) + 2 * len(others) + 1
    assert re.findall(r"^\| (\d[^|]*?) \|", table, re.MULTILINE)[:5] == [
        "2",
        "2",
        "2 for each temperature",
        "2 for each temperature but 1",
        "1",
    ]
