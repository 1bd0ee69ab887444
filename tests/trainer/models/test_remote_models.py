"""Teachers in Cloud Storage: what is fetched, what is refused, and which version is meant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from google.cloud import storage

from tests.faults.proxy import FaultProxy
from trainer.models.hugging_face import load_tokenizer
from trainer.models.pretrained import Pretrained
from trainer.models.teacher import TeacherSpec, load_teacher, read_teacher_spec, teacher_digest
from trainer.runtime.errors import LiquidError, ModelError, StorageError, UsageError

REVISIONS = """
import json
from trainer.models.hugging_face import load_tokenizer
from trainer.models.pretrained import Pretrained
from trainer.models.teacher import read_teacher_spec, teacher_digest
from trainer.runtime.errors import ModelError
for revision in (None, "v2", "b" * 40):
    model = Pretrained("owner/teacher", revision)
    positions = read_teacher_spec(model).max_context
    print(json.dumps([revision, positions, teacher_digest(model), len(load_tokenizer(model))]))
try:
    read_teacher_spec(Pretrained("owner/teacher", "v3"))
except ModelError as error:
    print(json.dumps(str(error)))
"""

INDEX = "model.safetensors.index.json"


def upload(uri: str, directory: Path) -> None:
    name, _, prefix = uri.removeprefix("gs://").partition("/")
    for path in directory.rglob("*"):
        if path.is_file():
            blob = storage.Client().bucket(name).blob(f"{prefix}/{path.relative_to(directory)}")
            blob.upload_from_filename(str(path))


def put(uri: str, name: str, data: bytes | str) -> None:
    bucket, _, prefix = uri.removeprefix("gs://").partition("/")
    storage.Client().bucket(bucket).blob(f"{prefix}/{name}").upload_from_string(data)


def remove(uri: str, name: str) -> None:
    bucket, _, prefix = uri.removeprefix("gs://").partition("/")
    storage.Client().bucket(bucket).blob(f"{prefix}/{name}").delete()


def fetched(proxy: FaultProxy) -> str:
    return "\n".join(path for _, path in proxy.requests if "alt=media" in path)


def loaded(spec: TeacherSpec) -> torch.Tensor:
    return load_teacher(spec, dtype=torch.float32, device=torch.device("cpu")).head


@pytest.fixture
def teacher(gcs_bucket: str, teacher_dir: Path) -> str:
    """A bucket's directory with a teacher."""
    upload(f"{gcs_bucket}/models/teacher", teacher_dir)
    return f"{gcs_bucket}/models/teacher"


@pytest.fixture
def model(teacher: str, tmp_path: Path) -> Pretrained:
    return Pretrained(teacher, cache_dir=str(tmp_path / "cache"))


def test_it_is_the_teacher_of_a_local_directory(
    model: Pretrained, teacher_dir: Path, gcs_proxy: FaultProxy
) -> None:
    put(model.name, "pytorch_model.bin", b"pickle")
    put(model.name, "tf_model.h5", b"h5")
    put(model.name, "original/model.safetensors", b"other")
    put(model.name, "README.md", b"words")
    gcs_proxy.requests.clear()
    assert load_tokenizer(model).get_vocab() == load_tokenizer(str(teacher_dir)).get_vocab()
    spec = read_teacher_spec(model)
    here = read_teacher_spec(str(teacher_dir))
    assert (spec.max_context, spec.vocab_size) == (here.max_context, here.vocab_size)
    assert "safetensors" not in fetched(gcs_proxy), "the weights wait until they are needed"
    assert torch.equal(loaded(spec), loaded(here))
    assert teacher_digest(model) == teacher_digest(str(teacher_dir))
    for unneeded in ("pytorch_model", "tf_model", "original", "README"):
        assert unneeded not in fetched(gcs_proxy)
    assert fetched(gcs_proxy).count("model.safetensors") == 1


def test_shards_are_those_that_their_index_names(
    model: Pretrained, teacher_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    shutil.copytree(teacher_dir, sharded)
    (sharded / "model.safetensors").unlink()
    original = AutoModelForCausalLM.from_pretrained(str(teacher_dir))
    original.save_pretrained(str(sharded), max_shard_size="100KB")
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 1
    upload(f"{model.name}/sharded", sharded)
    there = Pretrained(f"{model.name}/sharded", cache_dir=model.cache_dir)
    assert torch.equal(loaded(read_teacher_spec(there)), loaded(read_teacher_spec(model)))
    assert teacher_digest(there) == teacher_digest(str(sharded))
    remove(there.name, shards[-1])
    with pytest.raises(ModelError, match=f"{INDEX} names '{shards[-1]}', and no such file"):
        read_teacher_spec(there)


@pytest.mark.parametrize("path", ["../x.safetensors", "/etc/passwd", "absent.safetensors", ""])
def test_an_index_leads_nowhere_else(path: str, model: Pretrained, gcs_proxy: FaultProxy) -> None:
    put(f"{model.name}/..", "x.safetensors", b"")
    remove(model.name, "model.safetensors")
    put(model.name, "model-1.safetensors", b"")
    put(model.name, INDEX, json.dumps({"weight_map": {"a": path, "b": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=f"{INDEX} names '{path}', and no such file is beside it"):
        read_teacher_spec(model)
    assert ".safetensors?" not in fetched(gcs_proxy)


def test_what_is_no_teacher_is_refused_before_anything_is_fetched(
    model: Pretrained, gcs_proxy: FaultProxy
) -> None:
    remove(model.name, "model.safetensors")
    put(model.name, "pytorch_model.bin", b"pickle")
    gcs_proxy.requests.clear()
    with pytest.raises(ModelError, match="no weights as safetensors, and a pickle such as pytorch"):
        read_teacher_spec(model)
    remove(model.name, "config.json")
    with pytest.raises(ModelError, match=r"it has no config\.json; give the directory of a Hugg"):
        read_teacher_spec(model)
    with pytest.raises(ModelError, match=f"^student '{model.name}' cannot be loaded: it has no c"):
        read_teacher_spec(model, what="student")
    assert fetched(gcs_proxy) == ""


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(file: str, model: Pretrained, teacher_dir: Path) -> None:
    content = json.loads((teacher_dir / file).read_text())
    put(model.name, "modeling.py", "raise SystemExit('it ran')")
    put(model.name, file, json.dumps(content | {"auto_map": {"AutoConfig": "modeling.Config"}}))
    with pytest.raises(ModelError, match=f"its {file} asks for code of its own .* not run"):
        read_teacher_spec(model)
    with pytest.raises(ModelError, match="remote code is not run"):
        load_tokenizer(model)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", "[" * 100_000])
def test_a_damaged_configuration_is_one_line(content: str, model: Pretrained) -> None:
    put(model.name, "config.json", content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"cannot be loaded: config\.json") as told:
        read_teacher_spec(model)
    assert "\n" not in str(told.value)


def test_files_of_a_size_that_no_model_has_are_not_fetched(
    model: Pretrained, gcs_proxy: FaultProxy
) -> None:
    put(model.name, "vocab.json", b" " * ((32 << 20) + 1))
    gcs_proxy.requests.clear()
    with pytest.raises(ModelError, match=r"vocab\.json has 33554433 bytes; at most 33554432"):
        load_tokenizer(model)
    assert fetched(gcs_proxy) == ""


def test_a_teacher_that_changes_is_another_one(model: Pretrained, teacher_dir: Path) -> None:
    spec = read_teacher_spec(model)
    assert spec.model is not None
    config = json.loads((teacher_dir / "config.json").read_text())
    put(model.name, "config.json", json.dumps(config | {"architectures": None}))
    changed = read_teacher_spec(model)
    assert teacher_digest(model) != teacher_digest(str(teacher_dir))
    # A run that has read the first one does not go on with the second
    for read in (loaded, lambda spec: teacher_digest(spec.model)):
        read(changed)
        with pytest.raises(StorageError, match=f"was changed: .* not {spec.model.revision}; put"):
            read(spec)


def test_a_revision_on_the_hub(teacher_dir: Path, tmp_path: Path) -> None:
    """The hub's cache of this machine, without network, with two commits of one model."""
    directory = tmp_path / "hub" / "models--owner--teacher"
    for commit, name, positions in (("a" * 40, "main", 64), ("b" * 40, "v2", 32)):
        shutil.copytree(teacher_dir, directory / "snapshots" / commit)
        path = directory / "snapshots" / commit / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"n_positions": positions}))
        (directory / "refs").mkdir(exist_ok=True)
        (directory / "refs" / name).write_text(commit)
    done = subprocess.run(
        [sys.executable, "-c", REVISIONS],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found[0] == [None, 64, f"commit {'a' * 40}", 512]
    assert found[1] == ["v2", 32, f"commit {'b' * 40}", 512]
    assert found[2] == ["b" * 40, 32, f"commit {'b' * 40}", 512]
    assert "teacher 'owner/teacher' cannot be loaded: " in found[3]
    assert "\n" not in found[3]


def test_nothing_there_and_revisions_of_what_has_none(
    gcs_bucket: str, teacher_dir: Path, tmp_path: Path
) -> None:
    absent = Pretrained(f"{gcs_bucket}/nothing", cache_dir=str(tmp_path))
    for read in (read_teacher_spec, load_tokenizer, teacher_digest):
        with pytest.raises(LiquidError, match=f"no object at {gcs_bucket}/nothing, and none below"):
            read(absent)
    with pytest.raises(UsageError, match="--teacher_revision=main: .* is a local directory, which"):
        read_teacher_spec(Pretrained(str(teacher_dir), "main"))
