"""Which machine types carry which GPUs."""

from __future__ import annotations

import pytest
from google.cloud.aiplatform_v1 import AcceleratorType

from pipelines.machine_types import ATTACHED, BUILT_IN, check_pair
from pipelines.settings import load_settings
from trainer.runtime.errors import UsageError
from trainer.runtime.log import set_up_logging


@pytest.mark.parametrize(
    ("machine_type", "accelerator", "count", "message"),
    [
        (
            "n1-standard-8",
            "NVIDIA_TESLA_A100",
            1,
            "A_MACHINE_TYPE=n1-standard-8 cannot carry A_ACCELERATOR_TYPE=NVIDIA_TESLA_A100, but"
            " NVIDIA_TESLA_T4, NVIDIA_TESLA_P4, NVIDIA_TESLA_V100, NVIDIA_TESLA_P100; give"
            " A_MACHINE_TYPE=a2-highgpu-1g",
        ),
        (
            "a2-highgpu-1g",
            "NVIDIA_TESLA_T4",
            1,
            "carries 1 x NVIDIA_TESLA_A100, not A_ACCELERATOR_TYPE=NVIDIA_TESLA_T4; 1 of them fit",
        ),
        (
            "a2-highgpu-1g",
            "NVIDIA_A100_80GB",
            2,
            "not A_ACCELERATOR_TYPE=NVIDIA_A100_80GB; give A_MACHINE_TYPE=a2-ultragpu-2g",
        ),
        ("a3-highgpu-8g", "NVIDIA_H200_141GB", 1, "NVIDIA_H200_141GB comes with a3-ultragpu-8g (8"),
        (
            "a3-highgpu-8g",
            "NVIDIA_H100_80GB",
            4,
            "A_MACHINE_TYPE=a3-highgpu-8g has 8; give A_ACCELERATOR_COUNT=8, or"
            " A_MACHINE_TYPE=a3-highgpu-4g",
        ),
        ("a3-highgpu-3g", "NVIDIA_H100_80GB", 3, "no such type; choose one of a3-highgpu-1g, a3-h"),
        ("g2-standard-24", "NVIDIA_L4", 1, "=g2-standard-24 has 2; give A_ACCELERATOR_COUNT=2, or"),
        ("n1-standard-8", "NVIDIA_TESLA_T4", 3, "takes 1, 2, 4 of NVIDIA_TESLA_T4; give A_ACCELER"),
        ("n1-standard-32", "NVIDIA_TESLA_V100", 2, "takes 4, 8 of NVIDIA_TESLA_V100; 2 of them"),
        ("n1-ultramem-40", "NVIDIA_TESLA_T4", 1, "=n1-ultramem-40 takes no GPU; 1 of them fit"),
        ("e2-standard-4", "NVIDIA_L4", 8, "takes no GPU; give A_MACHINE_TYPE=g2-standard-96"),
        ("e2-standard-4", "TPU_V3", 8, "takes no GPU; give another of either"),
    ],
)
def test_pairs_that_no_machine_has(
    machine_type: str, accelerator: str, count: int, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_pair("A", machine_type, accelerator, count)
    assert message in str(caught.value)


def test_every_machine_of_the_table_carries_what_it_says() -> None:
    for family, built_in in BUILT_IN.items():
        for size, count in built_in.counts.items():
            check_pair("A", f"{family}-{size}", built_in.accelerator, count)
    check_pair("A", "a3-megagpu-8g-nolssd", "NVIDIA_H100_MEGA_80GB", 8)
    for accelerator, limits in ATTACHED.items():
        for count in limits:
            check_pair("A", "n1-highmem-8", accelerator, count)
    kinds = {one.accelerator for one in BUILT_IN.values()} | set(ATTACHED)
    assert kinds <= set(AcceleratorType.__members__)


def test_an_unknown_family_passes_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"MACHINE_TYPE": "a9-giga-8g", "ACCELERATOR_TYPE": "NVIDIA_B200"}
    set_up_logging()
    environ = {f"ANNEAL_{name}": value for name, value in given.items()}
    load_settings(environ | {"ANNEAL_ACCELERATOR_COUNT": "8"}).check_vertex()
    (line,) = capsys.readouterr().err.splitlines()
    assert "ANNEAL_MACHINE_TYPE=a9-giga-8g is of no family known here" in line
