"""A snapshot's bytes are written, summed and sent once, whatever the number of its names."""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import pytest
import torch

from tests.faults.proxy import FaultProxy
from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.names import BEST, FINAL, best_name, step_name
from trainer.checkpoints.snapshots import Snapshots, read_from

PARAMETERS = 600_000
BEST_AND_STEP = [best_name(3, 4.2), BEST, step_name(3)]
LAST = [*BEST_AND_STEP, FINAL]


class Counter:
    """Bytes that were summed, and bytes that reached the object server."""

    def __init__(self) -> None:
        self.summed = self.sent = 0


@pytest.fixture
def counted(gcs_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter()
    asked, real = gcs_proxy.ask, google_crc32c.Checksum

    def ask(method: str, path: str, body: bytes, headers: dict[str, str]):  # type: ignore[no-untyped-def]
        counter.sent += len(body) if path.startswith("/upload/") else 0
        return asked(method, path, body, headers)

    class Checksum(real):  # type: ignore[valid-type,misc]
        def __init__(self, data: bytes = b"") -> None:
            super().__init__(data)
            counter.summed += len(data)

        def update(self, chunk: bytes) -> None:
            super().update(chunk)
            counter.summed += len(chunk)

    gcs_proxy.ask = ask  # type: ignore[method-assign]
    monkeypatch.setattr(google_crc32c, "Checksum", Checksum)
    return counter


def snapshot() -> Snapshot:
    meta = {"step": 3, "metrics": {}}
    return Snapshot({"weight": torch.randn(PARAMETERS)}, None, {}, 3, {}, meta)


@pytest.mark.parametrize("names", [BEST_AND_STEP, LAST], ids=["best and step", "last step"])
def test_content_is_sent_and_summed_once(
    names: list[str], counted: Counter, gcs_bucket: str, tmp_path: Path
) -> None:
    size = written_alone(tmp_path, counted)
    snapshots = Snapshots(f"{gcs_bucket}/run", str(tmp_path / "work"))
    snapshots.save(snapshot(), names)
    snapshots.finish()
    times = f"sent {counted.sent / size:.3f}x, summed {counted.summed / size:.3f}x"
    print(f"\n{len(names)} names: {times}")
    # Beside the content: sidecars, and the requests around them
    assert size <= counted.sent < 1.01 * size
    assert size <= counted.summed < 1.01 * size
    for name in names:
        counted.summed = 0
        assert read_from(f"{gcs_bucket}/run/{name}", tmp_path / "work").step == 3
        assert size <= counted.summed < 1.01 * size


@pytest.mark.parametrize("names", [BEST_AND_STEP, LAST], ids=["best and step", "last step"])
def test_locally_it_is_written_once(names: list[str], counted: Counter, tmp_path: Path) -> None:
    size = written_alone(tmp_path, counted)
    run = tmp_path / "run"
    snapshots = Snapshots(str(run), str(tmp_path / "work"))
    snapshots.save(snapshot(), names)
    snapshots.finish()
    assert size <= counted.summed < 1.01 * size
    assert len({(run / name).read_bytes() for name in names}) == 1
    written = {(run / name).stat().st_ino: (run / name).stat().st_blocks for name in names}
    shared = len(written) == 1
    # Where the file system has reflinks, the files are apart and share their blocks
    assert shared or len(written) == len(names)
    assert not list(run.glob(".staging*"))
    counted.summed = 0
    assert read_from(str(run / BEST), tmp_path / "work").step == 3
    assert size <= counted.summed < 1.01 * size


def written_alone(scratch: Path, counted: Counter) -> int:
    """Bytes of the file, which are not counted."""
    snapshot().write(scratch / "alone" / "snapshot.pt")
    counted.summed = counted.sent = 0
    return (scratch / "alone" / "snapshot.pt").stat().st_size
