from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.runtime import log as log_module
from trainer.runtime.errors import LiquidError, UsageError
from trainer.settings.config import TrainConfig
from trainer.settings.hf_token import find_hf_token


@pytest.fixture
def sources(tmp_path: Path) -> TrainConfig:
    (tmp_path / "file").write_text("hf_file\n")
    (tmp_path / "object").write_text("hf_object\n")
    return TrainConfig(
        hf_token_value="hf_value",
        hf_token_file=str(tmp_path / "file"),
        hf_token_gcs_uri=str(tmp_path / "object"),
    )


def test_the_order_of_the_sources(sources: TrainConfig) -> None:
    from dataclasses import replace

    assert find_hf_token(sources, {"HF_TOKEN": "hf_env"}) == "hf_env"
    assert find_hf_token(sources, {"HUGGING_FACE_HUB_TOKEN": "hf_env2"}) == "hf_env2"
    assert find_hf_token(sources, {}) == "hf_value"
    assert find_hf_token(replace(sources, hf_token_value=None), {}) == "hf_file"
    assert (
        find_hf_token(replace(sources, hf_token_value=None, hf_token_file=None), {}) == "hf_object"
    )
    assert find_hf_token(TrainConfig(), {}) is None


def test_a_token_found_is_hidden_from_every_log_line(
    sources: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    token = find_hf_token(sources, {"HF_TOKEN": "hf_planted_token"})
    log_module.set_up_logging()
    log_module.log.error("a library said: %s", f"401 for {token}")
    log_module.log_values("values", header=f"Bearer {token}")
    log_module.report_failure(LiquidError(f"it failed with {token}"))
    try:
        raise RuntimeError(f"deep inside: {token}")
    except RuntimeError as error:
        log_module.report_failure(error)
    shown = capsys.readouterr().err
    assert "hf_planted_token" not in shown
    assert len([json.loads(line) for line in shown.splitlines()]) == 4
    assert shown.count("***") == 4


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--hf_token_file=.* cannot be read: No such file"):
        find_hf_token(TrainConfig(hf_token_file=str(tmp_path / "absent")), {})
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UsageError, match="it is empty"):
        find_hf_token(TrainConfig(hf_token_file=str(tmp_path / "empty")), {})
    with pytest.raises(LiquidError, match="absent"):
        find_hf_token(TrainConfig(hf_token_gcs_uri=str(tmp_path / "absent")), {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="does not hold text"):
        find_hf_token(TrainConfig(hf_token_gcs_uri=str(tmp_path / "binary")), {})


@pytest.mark.parametrize("token", ["hf_a\n# team", "hf a", "hf_\x00"])
def test_what_no_header_could_carry_is_no_token(token: str) -> None:
    with pytest.raises(UsageError, match="^--hf_token_value holds no token") as caught:
        find_hf_token(TrainConfig(hf_token_value=token), {})
    assert token not in str(caught.value)
