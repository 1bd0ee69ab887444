"""Compiled code kept by runs that start in processes, and with compilers' caches, of their own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoints.metadata import compiled_of
from trainer.checkpoints.names import COMPILE_CACHE
from trainer.checkpoints.sidecar import read_sidecars
from trainer.storage.places import open_location

Settings = dict[str, Any]

_START = """
import json, sys
from torch._dynamo.utils import counters
from trainer import entrypoint
from trainer.runtime.log import set_up_logging
set_up_logging()
entrypoint.run(json.loads(sys.argv[1]))
print(json.dumps(counters["inductor"]))
"""


class Start:
    """A start on a machine of its own: nothing that was compiled before is there."""

    def __init__(self, settings: Settings, machine: Path) -> None:
        environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(machine)}
        done = subprocess.run(
            [sys.executable, "-c", _START, json.dumps(settings)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        counted = json.loads(done.stdout.splitlines()[-1])
        self.compiled = counted.get("fxgraph_cache_miss", 0)
        self.found = counted.get("fxgraph_cache_hit", 0)
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        self.messages = [line["message"] for line in lines if "compiled code" in line["message"]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings | {"compile": "on", "n_layers": 1, "train_steps": 4, "eval_every": 2}


@pytest.fixture
def kept(settings: Settings, tmp_path: Path) -> Path:
    """The output of a run that was killed after its first snapshot."""
    output = Path(settings["local_workdir"])
    first = Start(settings | {"save_every": 2}, tmp_path / "machine-1")
    assert first.compiled > 0
    assert first.found == 0
    assert not first.messages, "none was looked for"
    digest = hashlib.sha256((output / COMPILE_CACHE).read_bytes()).hexdigest()
    sidecars = read_sidecars(open_location(str(output)))
    assert {compiled_of(sidecar.meta) for sidecar in sidecars} == {digest}
    for sidecar in sidecars:
        if sidecar.step == 4:
            for path in output.glob(f"{sidecar.name}*"):
                path.unlink()
    return output


def test_a_restart_finds_all_that_was_compiled(
    settings: Settings, kept: Path, tmp_path: Path
) -> None:
    before = (kept / COMPILE_CACHE).stat()
    again = Start(settings, tmp_path / "machine-2")
    assert (again.compiled, again.found > 0) == (0, True)
    assert len(again.messages) == 1
    assert "using the compiled code" in again.messages[0]
    after = (kept / COMPILE_CACHE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (final,) = [s for s in read_sidecars(open_location(str(kept))) if s.name == "final.pt"]
    assert compiled_of(final.meta) is not None, "later starts may use it too"


def test_another_run_takes_it_only_where_it_is_named(
    settings: Settings, kept: Path, tmp_path: Path
) -> None:
    """Neither a checkpoint to start from nor a file at the output vouches for code."""
    other = settings | {
        "local_workdir": str(tmp_path / "other"),
        "resume_gcs_uri": str(kept / "ckpt_step_2.pt"),
        "train_steps": 5,
    }
    Path(other["local_workdir"]).mkdir()
    planted = Path(other["local_workdir"], COMPILE_CACHE)
    planted.write_bytes((kept / COMPILE_CACHE).read_bytes())
    alone = Start(other, tmp_path / "machine-2")
    assert (alone.compiled > 0, alone.messages) == (True, [])
    named = other | {
        "local_workdir": str(tmp_path / "third"),
        "compile_cache": str(kept / COMPILE_CACHE),
    }
    with_it = Start(named, tmp_path / "machine-3")
    assert (with_it.compiled, with_it.found > 0) == (0, True)
    assert (tmp_path / "third" / COMPILE_CACHE).exists(), "for its own restarts"
