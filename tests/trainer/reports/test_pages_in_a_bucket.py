"""Reports and comparisons of runs in a bucket, written to a bucket: as of a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.reports.records import write_run
from trainer import compare, report
from trainer.metrics.lines import METRICS
from trainer.runtime.commands import run_command
from trainer.storage.places import open_location, read_bytes

LIMIT = 8 << 20


def test_runs_and_pages_of_a_bucket(
    gcs_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        record = write_run(tmp_path / "runs" / name, settings={"seed": len(name)}) / METRICS
        open_location(f"{gcs_bucket}/runs/{name}").put_bytes(record.read_bytes(), METRICS)
    scratch = f"--local_workdir={tmp_path / 'work'}"

    def written(root: str) -> list[bytes]:
        runs, output = [f"{root}/runs/{name}" for name in ("one", "two")], f"{root}/pages"
        assert run_command(compare.main, [*runs, f"--output={output}", scratch]) == 0
        assert run_command(report.main, [runs[0], f"--output={output}", scratch]) == 0
        pages = (compare.HTML, report.HTML, report.MARKDOWN)
        return [read_bytes(f"{output}/{page}", limit=LIMIT) for page in pages]

    there, here = written(gcs_bucket), written(str(tmp_path))
    assert all(there)
    texts = [page.decode().replace(gcs_bucket, str(tmp_path)) for page in there]
    assert texts == [page.decode() for page in here]
    assert run_command(compare.main, [f"{gcs_bucket}/runs/one", f"{gcs_bucket}/absent"]) == 1
    assert f"{gcs_bucket}/absent" in capsys.readouterr().err.splitlines()[-1]
