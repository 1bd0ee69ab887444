from __future__ import annotations

import math

import pytest

from trainer.runtime.errors import UsageError
from trainer.settings.schedules import (
    ALPHA_RANGE,
    SCHEDULE_LIMIT,
    TEMPERATURE_RANGE,
    StepSchedule,
    learning_rate,
)


def alpha(text: str, initial: float = 0.5) -> StepSchedule:
    return StepSchedule.parse(text, initial, name="alpha_schedule", allowed=ALPHA_RANGE)


def temperature(text: str, initial: float = 1.0) -> StepSchedule:
    return StepSchedule.parse(text, initial, name="temp_schedule", allowed=TEMPERATURE_RANGE)


def test_a_value_that_no_update_takes_is_none_of_the_schedules() -> None:
    """With alpha 0 from the start on, no teacher is needed, whatever alpha itself says."""
    assert StepSchedule(0.5, ((0, 0.0),)).values() == {0.0}
    assert StepSchedule(0.5, ((10, 0.0),)).values() == {0.5, 0.0}
    assert StepSchedule(0.5).values() == {0.5}


def test_run_a_at_every_step() -> None:
    weight, temp = alpha("0:0.7,400:0.5,800:0.3"), temperature("0:1.2,800:1.0")
    table = [(0, 400, 0.7, 1.2), (400, 800, 0.5, 1.2), (800, 1200, 0.3, 1.0)]
    for first, end, expected_alpha, expected_T in table:
        for step in range(first, end):
            assert (weight.at(step), temp.at(step)) == (expected_alpha, expected_T), step


def test_run_b_at_every_step() -> None:
    weight = alpha("0:0.5,2000:0.4,4000:0.3")
    for first, end, expected in [(0, 2000, 0.5), (2000, 4000, 0.4), (4000, 6000, 0.3)]:
        assert {weight.at(step) for step in range(first, end)} == {expected}


@pytest.mark.parametrize(("warmup", "total"), [(200, 1200), (400, 6000)])
def test_learning_rate_at_every_step_of_both_runs(warmup: int, total: int) -> None:
    peak = 2.7e-4
    for step in range(total + 5):
        found = learning_rate(step, peak=peak, warmup_steps=warmup, train_steps=total)
        if step < warmup:
            expected = peak * (step + 1) / warmup
        else:
            share = min(1.0, (step - warmup) / (total - warmup))
            expected = peak * (0.55 + 0.45 * math.cos(math.pi * share))
        assert found == pytest.approx(expected, rel=1e-12), step
    assert learning_rate(0, peak=peak, warmup_steps=warmup, train_steps=total) > 0.0
    end = learning_rate(total, peak=peak, warmup_steps=warmup, train_steps=total)
    assert end == pytest.approx(0.1 * peak)


def test_no_warmup_and_warmup_longer_than_the_run() -> None:
    assert learning_rate(0, peak=1.0, warmup_steps=0, train_steps=10) == 1.0
    assert learning_rate(0, peak=1.0, warmup_steps=2000, train_steps=1) == 1.0 / 2000
    assert learning_rate(0, peak=1.0, warmup_steps=0, train_steps=0) == pytest.approx(0.1)


def test_before_the_first_entry_the_initial_value_holds() -> None:
    schedule = alpha("10:0.2", initial=0.9)
    assert [schedule.at(step) for step in (0, 9, 10, 11)] == [0.9, 0.9, 0.2, 0.2]
    assert alpha("").at(123) == 0.5


def test_pending_is_what_lies_ahead() -> None:
    schedule = alpha("0:0.7,400:0.5,800:0.3")
    assert schedule.pending(-1) == "0:0.7,400:0.5,800:0.3"
    assert schedule.pending(0) == "400:0.5,800:0.3"
    assert schedule.pending(400) == "800:0.3"
    assert schedule.pending(799) == "800:0.3"
    assert schedule.pending(800) == ""
    resumed = alpha(schedule.pending(500), initial=schedule.at(500))
    assert all(resumed.at(step) == schedule.at(step) for step in range(500, 1200))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0:0.7,4x0:0.5", ["entry 2 ('4x0:0.5')", "'x' at character 8", "whole number"]),
        ("0:0.7,400", ["entry 2 ('400')", "character 10", "':' is missing"]),
        ("0:0.7,,800:0.3", ["entry 2 ('')", "character 7", "it is empty"]),
        ("0:0.7,", ["entry 2", "it is empty"]),
        ("0:abc", ["entry 1 ('0:abc')", "'a' at character 3", "decimal number"]),
        ("0:0.7.1", ["'.' at character 6"]),
        ("0:", ["entry 1 ('0:')", "the end of the entry"]),
        ("-5:0.7", ["'-' at character 1", "cannot be negative"]),
        ("0:0.7,0:0.5", ["entry 2", "step 0 is given twice"]),
        ("400:0.7,0:0.5", ["entry 2", "step 0 comes after step 400"]),
        ("0:1.5", ["entry 1", "1.5 must be between 0 and 1"]),
        ("0:0.5,3:-0.1", ["entry 2", "-0.1 must be between 0 and 1"]),
        ("0:nan", ["'n' at character 3"]),
        ("٣:0.5", ["entry 1", "whole number"]),
    ],
)
def test_malformed_alpha_schedule_names_entry_and_character(text: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        alpha(text)
    message = str(caught.value)
    assert "\n" not in message
    for part in ["--alpha_schedule=", *parts]:
        assert part in message, message


def test_temperature_must_be_above_zero() -> None:
    assert temperature("0:4,10:0.5").at(10) == 0.5
    with pytest.raises(UsageError, match="entry 2 .*the value 0 must be above 0"):
        temperature("0:1.0,5:0")
    with pytest.raises(UsageError, match="must be above 0"):
        temperature("0:1e999")


@pytest.mark.timeout(60)
def test_a_schedule_with_an_entry_for_every_update_is_parsed_once_through() -> None:
    """Hundreds of times as many as the longest took a minute for; a quadratic parse hangs."""
    steps = SCHEDULE_LIMIT // len("123456:0.5,")
    text = ",".join(f"{step}:{step % 10 / 10}" for step in range(steps))
    schedule = alpha(text)
    assert len(schedule.entries) == steps
    assert schedule.pending(-1) == text.replace("0.0", "0")
    assert schedule.at(steps - 1) == (steps - 1) % 10 / 10


def test_a_message_about_a_long_schedule_is_short() -> None:
    good = ",".join(f"{step}:0.5" for step in range(16_000))
    for text, parts in (
        (f"{good},x", ["entry 16001 ('x')", "the end of the entry, character"]),
        (good + "," + "9" * 1000, ["entry 16001 ('9999", "':' is missing"]),
        (f"{good},3:0.5", ["entry 16001", "step 3 comes after step 15999"]),
        (f"{good},99999:7", ["entry 16001", "7 must be between 0 and 1"]),
        ("0:0.5," * SCHEDULE_LIMIT, [f"has {6 * SCHEDULE_LIMIT} characters", "fewer entries"]),
    ):
        with pytest.raises(UsageError) as caught:
            alpha(text)
        message = str(caught.value)
        assert len(message) < 500
        for part in ["--alpha_schedule='", *parts]:
            assert part in message, message
