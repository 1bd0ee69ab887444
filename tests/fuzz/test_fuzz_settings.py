"""Settings files, changed line by line and character by character: read right, or one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from pipelines.settings import Settings, load_settings
from tests.fuzz.runs import bounded_memory, contents, one_line, run_property
from trainer.runtime.errors import UsageError
from trainer.settings.config import SETTINGS, TrainConfig
from trainer.settings.layers import resolve, settings_from_yaml
from trainer.settings.values import as_text, parse_value

RUN = """\
# A phase at 512 tokens
teacher_name: "gpt2-xl"
dataset_name: wikitext
dataset_config: wikitext-103-raw-v1
block_size: 512
alpha_schedule: 0:0.7,400:0.5
temp_schedule: '0:1.2,800:1.0'
eval_ctx_lens: [512, 1024]
betas: [0.9, 0.95]
lr: 3e-4
eps: 1.0e-8
grad_clip: 1
weight_decay: 0.1
fp16: no
bf16: true
micro_batch: auto
seed: 7
d_model: 768
resume_gcs_uri: ~
output_gcs_uri: /tmp/run-$(date +%Y%m%d)
local_workdir: >-
  /tmp/folded
  name
"""

PIPELINE = """\
project: my-project
region: us-central1
pipeline_root: gs://bucket/root
labels: {team: a, cost: "1"}
poll_seconds: 15
anneal_accelerator_type: NVIDIA_TESLA_A100
anneal_accelerator_count: 1
anneal_machine_type: a2-highgpu-1g
continue_scheduling: spot
prepare_memory: 32Gi
prepare_cpu: "4"
"""

NASTY = [
    *("", "~", "null", "no", "0x1F", "1_000", "0123", ".inf", "-.inf", ".nan", "nan", "1e300"),
    *("1e-300", "-1", "9" * 30, "9" * 5000, "1e5000", "0:0.7", "0:1,", "0:1e-300", "5:0.1,4:0.2"),
    *("'", '"', '"\\0"', '"a\\0b"', '"\\ud800"', '"\\x1b[2J"', "[", "[]", "[[[[[]]]]]", "{}"),
    *("{a: 1, a: 2}", "&a [*a]", "*a", "!!int 5", "!!set {a}", "!mine x", "| \n  a\n  b", "> x"),
    *("$(date)", "$(date +%Q)", "$(touch CANARY)", "`touch CANARY`", "~nobody/x", "gs://", "a://b"),
    "!!python/object/apply:os.mkdir ['CANARY']",
    "!!python/object/new:os.system ['mkdir CANARY']",
    "[" * 5000,
    "x" * 100_000,
    "- " * 3000,
    "true",
    "512",
    "0.5",
    "[1, 2]",
    "0.9 0.95",
]

CHARACTERS = st.sampled_from(
    [
        *":-?[]{},&*!|>'\"%@`#~\\/ \n\t\r",
        "\0",
        "\x85",
        "\u2028",
        "\ufeff",
        "\ud83d",
        "é",
        "0",
        "e",
        ".",
        "a",
    ]
)

CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("value"), st.integers(0, 30), st.sampled_from(NASTY)),
        st.tuples(st.just("name"), st.integers(0, 30), st.sampled_from([*SETTINGS, *NASTY])),
        st.tuples(st.just("remove"), st.integers(0, 30), st.none()),
        st.tuples(st.just("again"), st.integers(0, 30), st.sampled_from([1, 2, 3000])),
        st.tuples(st.just("indent"), st.integers(0, 30), st.integers(1, 9)),
        st.tuples(st.just("nest"), st.integers(0, 30), st.sampled_from([1, 5, 30, 3000])),
        st.tuples(st.just("insert"), st.integers(0, 700), CHARACTERS),
        st.tuples(st.just("replace"), st.integers(0, 700), CHARACTERS),
        st.tuples(st.just("delete"), st.integers(0, 700), st.integers(1, 40)),
        st.tuples(st.just("many"), st.just(0), st.sampled_from([100, 6000, 60_000])),
        st.tuples(st.just("bytes"), st.integers(0, 700), st.binary(min_size=1, max_size=3)),
    ),
    min_size=1,
    max_size=3,
)


MOST = 4 << 20
"""Characters of a changed file: more than is ever read of one."""


def changed(text: str, changes: list[tuple[str, int, Any]]) -> bytes:
    for kind, place, value in changes:
        lines = text.split("\n")
        at = place % len(lines)
        name, colon, old = lines[at].partition(":")
        if kind == "value":
            lines[at] = f"{name}{colon} {value}"
        elif kind == "name":
            lines[at] = f"{value}{colon}{old}"
        elif kind == "remove":
            del lines[at]
        elif kind == "again":
            lines[at:at] = [lines[at]] * value
        elif kind == "indent":
            lines[at] = " " * value + lines[at]
        elif kind == "nest":
            lines[at] = f"{name}{colon} {'[' * value}{old}{']' * value}"
        elif kind == "many":
            lines += [f"x{number}: {number}" for number in range(value)]
        text = "\n".join(lines)[:MOST]
        if kind == "insert":
            text = text[:place] + value + text[place:]
        elif kind == "replace":
            text = text[:place] + value + text[place + 1 :]
        elif kind == "delete":
            text = text[:place] + text[place + value :]
    data = text.encode("utf-8", "surrogatepass")
    for kind, place, value in changes:
        if kind == "bytes":
            data = data[:place] + value + data[place:]
    return data


def check_run(directory: Path, changes: list[tuple[str, int, Any]]) -> bool:
    """Whether a settings file of the trainer was accepted."""
    path = directory / "run.yaml"
    path.write_bytes(changed(RUN, changes))
    before = contents(directory)
    try:
        given = settings_from_yaml(str(path))
        config = resolve({}, given).config
    except UsageError as error:
        one_line(error)
        accepted = False
    else:
        told = yaml.load(path.read_bytes(), Loader=yaml.BaseLoader) or {}
        assert given.keys() <= told.keys()
        for name, value in given.items():
            assert parse_value(name, as_text(name, value)) == value, name
            if isinstance(told[name], str) and SETTINGS[name].metadata["parse"] is None:
                assert parse_value(name, told[name]) == value, name
        assert isinstance(config, TrainConfig)
        for text in (config.uri, config.local_workdir, config.teacher_name, config.dataset_name):
            os.path.exists(text or "")  # raises where the system cannot be told of it
            assert "\0" not in (text or "")
        accepted = True
    assert contents(directory) == before
    assert not Path("CANARY").exists()
    return accepted


def check_pipeline(directory: Path, changes: list[tuple[str, int, Any]]) -> bool:
    """Whether a settings file of the pipeline was accepted."""
    path = directory / "pipeline.yaml"
    path.write_bytes(changed(PIPELINE, changes))
    before = contents(directory)
    try:
        found = load_settings({"SETTINGS": str(path)})
    except UsageError as error:
        one_line(error)
        accepted = False
    else:
        assert isinstance(found, Settings)
        found.processes("vertex")
        accepted = True
    assert contents(directory) == before
    assert not Path("CANARY").exists()
    return accepted


READERS = pytest.mark.parametrize("check", [check_run, check_pipeline])


@READERS
def test_whole_files_are_accepted(check: Callable[..., bool], tmp_path: Path) -> None:
    assert check(tmp_path, [])


@READERS
def test_changed_files(check: Callable[..., bool], tmp_path: Path) -> None:
    with bounded_memory():
        run_property(lambda changes: check(tmp_path, changes), CHANGES, examples=150)


@READERS
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_changed_files_for_long(check: Callable[..., bool], tmp_path: Path) -> None:
    with bounded_memory():
        run_property(lambda changes: check(tmp_path, changes), CHANGES, examples=2500)
