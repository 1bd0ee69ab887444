"""What a start finds at its output location."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from trainer.snapshots import Snapshots


def test_what_killed_processes_left_is_removed_and_what_running_ones_have_is_not(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    for name in (
        f".staging-{host}-{ended.pid}-a",
        f".staging-{host}-{os.getpid()}-b",  # of an earlier container, whose numbers come again
        f".staging-{host}-{os.getppid()}-c",
        f".staging-elsewhere-{ended.pid}-d",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "snapshot.pt").write_bytes(b"x")
    Snapshots(str(tmp_path), str(tmp_path)).check_writable()
    kept = sorted(path.name.rpartition("-")[2] for path in tmp_path.glob(".staging-*"))
    assert kept == ["c", "d"]
