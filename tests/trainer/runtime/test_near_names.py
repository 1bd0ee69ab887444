"""Which name a wrong one is taken for."""

from __future__ import annotations

import pytest
from google.cloud.aiplatform_v1 import AcceleratorType

from pipelines.settings import known_names
from trainer.runtime.near_names import near_name
from trainer.settings.config import SETTINGS


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--alfa", "alpha"),
        ("train-steps", "train_steps"),
        ("drop_out", "dropout"),
        ("micro_batch_size", "micro_batch"),
        ("steps", "train_steps"),
        ("alpha_shedule", "alpha_schedule"),
        # Another quantity under a name that looks alike would be worse than no hint
        ("epochs", ""),
        ("batch_size", ""),
        ("lr_schedule", ""),
        ("max_length", ""),
        ("", ""),
    ],
)
def test_settings_of_the_trainer(wrong: str, meant: str) -> None:
    assert near_name(wrong, SETTINGS) == meant


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("NVIDIA_H100", "NVIDIA_H100_80GB"),
        ("NVIDIA_H200", "NVIDIA_H200_141GB"),
        ("nvidia-l4", "NVIDIA_L4"),
        ("T4", "NVIDIA_TESLA_T4"),
        ("NVIDIA_TSLA_T4", "NVIDIA_TESLA_T4"),
        ("GAUDI", ""),
    ],
)
def test_accelerators(wrong: str, meant: str) -> None:
    assert near_name(wrong, AcceleratorType.__members__) == meant


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("ANEAL_REPLICAS", "ANNEAL_REPLICAS"),
        ("ANNEAL_ACCELERATOR_CNT", "ANNEAL_ACCELERATOR_COUNT"),
        ("REGOIN", "REGION"),
        ("IMAGE", "TRAINER_IMAGE"),
        ("ZONE", ""),
    ],
)
def test_settings_of_the_pipeline(wrong: str, meant: str) -> None:
    assert near_name(wrong, known_names()) == meant
