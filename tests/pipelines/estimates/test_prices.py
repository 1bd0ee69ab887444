"""The file of prices, its arithmetic, and what is wrong with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipelines.estimates.prices import PRICES, gib, read_prices
from pipelines.settings import Settings, load_settings
from pipelines.stages import DEFAULT_MACHINES, Machine
from trainer.runtime.errors import UsageError


def test_the_default_machines_have_a_price() -> None:
    prices = read_prices()
    assert all(prices.hourly(machine) for machine in DEFAULT_MACHINES.values())
    assert prices.region == Settings().region


def test_what_a_stage_costs_for_an_hour() -> None:
    prices = read_prices()
    h100 = {"machine_type": "a3-highgpu-8g", "accelerator_type": "NVIDIA_H100_80GB"}
    machine = Machine(**h100, accelerator_count=8, replicas=2)  # type: ignore[arg-type]
    assert prices.hourly(machine) == pytest.approx(2 * 88.49 * 1.15)
    t4 = Machine(
        machine_type="n1-standard-8", accelerator_type="NVIDIA_TESLA_T4", accelerator_count=2
    )
    assert prices.hourly(t4) == pytest.approx((0.38 + 2 * 0.35) * 1.15)
    spot = Machine(
        machine_type="n1-standard-8",
        accelerator_type="NVIDIA_TESLA_T4",
        accelerator_count=2,
        scheduling="spot",
    )
    assert prices.hourly(spot) == pytest.approx((0.12 + 2 * 0.14) * 1.15)
    assert prices.hourly(replace(spot, scheduling="flex_start")) == prices.hourly(t4)


def test_a_plain_task_gets_the_cheapest_machine_that_is_large_enough() -> None:
    prices = read_prices()
    assert prices.plain(Machine(cpu="8", memory="32Gi")) == "e2-standard-8"
    assert prices.plain(Machine(cpu="500m", memory="9G")) == "e2-highmem-2"
    assert prices.plain(Machine(cpu="8", memory="4Ti")) == ""
    assert prices.hourly(Machine(cpu="1000", memory="1Gi")) is None


def test_a_machine_that_has_no_price_has_none() -> None:
    prices = read_prices()
    for machine_type, accelerator in (
        ("a9-highgpu-1g", "NVIDIA_H100_80GB"),
        ("n1-standard-8", "NVIDIA_L4"),
        ("a2-highgpu-1g", "NVIDIA_TESLA_T4"),
    ):
        machine = Machine(
            machine_type=machine_type, accelerator_type=accelerator, accelerator_count=1
        )
        assert prices.hourly(machine) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("16G", 16e9 / 2**30), ("512Mi", 0.5), ("1073741824", 1.0), ("2Ti", 2048)],
)
def test_units_of_memory(text: str, expected: float) -> None:
    assert gib(Machine(memory=text)) == pytest.approx(expected)


WRONG = {
    "machines: [": "is not valid YAML at line",
    "{}": "missing: date, region, currency, vertex_fee",
    "date: soon": "date='soon': write it as 2026-11",
    "date: [2026]": "date: a text is needed",
    "dates: 2026-11": "unknown entry 'dates'; did you mean date?",
    "run: cheap": "run='cheap': a number is needed",
    "run: nan": "run='nan' must be from 0",
    "run: -1": "run='-1' must be from 0",
    "vertex_fee: 0.5": "vertex_fee=0.5 must be at least 1",
    "machines: 5": "machines: 'NAME: {on_demand: …}' lines are needed",
    "machines: {n1-standard-4: 5}": "machines: n1-standard-4='5': write it as {on_demand:",
    "machines: {a: {spot: 1}}": "machines: a: on_demand is missing",
    "machines: {a: {on_demand: 1, spott: 1}}": "a: unknown entry 'spott'; did you mean spot?",
    "accelerators: {T: {on_demand: [1]}}": "accelerators: T: on_demand=['1']: a number is needed",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items(), ids=str)
def test_a_wrong_file_is_one_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prices.yaml"
    key = line.partition(":")[0]
    whole = yaml.safe_load(PRICES.read_text())
    whole.pop(key, None)
    path.write_text(line if line in ("{}", "machines: [") else f"{line}\n{yaml.safe_dump(whole)}")
    with pytest.raises(UsageError) as error:
        read_prices(str(path))
    assert str(error.value).startswith(f"PRICES={str(path)!r}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_absent() -> None:
    with pytest.raises(UsageError, match="PRICES='absent.yaml' cannot be read"):
        read_prices("absent.yaml")
    assert load_settings({"PRICES": "absent.yaml"}).prices == "absent.yaml"
