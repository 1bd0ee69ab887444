"""Digests of files: the same here and in a bucket, where nothing is read for them."""

from __future__ import annotations

from pathlib import Path

from tests.faults.proxy import FaultProxy
from trainer.storage.digests import digest_at, digest_of_file
from trainer.storage.places import open_location

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 64}


def test_a_directory_and_its_copy_in_a_bucket_have_one_digest(
    tmp_path: Path, gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    there = f"{gcs_bucket}/exported"
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        open_location(there).put_bytes(content, name)
    gcs_proxy.requests.clear()
    assert digest_at(there) == digest_at(str(tmp_path))
    for name in FILES:
        assert digest_of_file(f"{there}/{name}") == digest_of_file(str(tmp_path / name))
    assert not [one for one in gcs_proxy.requests if "alt=media" in one[1]]
    before = digest_at(str(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "generation_config.json")
    assert digest_at(str(tmp_path)) != before
