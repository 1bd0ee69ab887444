"""A log window that a snapshot cuts gives the line that it would have given."""

from __future__ import annotations

import random

import pytest
import torch

from trainer.loss.chunked import DistillLoss
from trainer.runtime.processes import Processes
from trainer.training.log_window import LogWindow

ALONE = Processes()


def window() -> LogWindow:
    return LogWindow(torch.device("cpu"))


def train(into: LogWindow, updates: list[list[float]]) -> None:
    for losses in updates:
        for loss in losses:
            into.add(DistillLoss(*torch.tensor([loss, loss / 3, loss / 7])))
        into.add_norm(torch.tensor(losses[0]))


def some_updates() -> list[list[float]]:
    draw = random.Random(3)
    return [[draw.uniform(1.0, 9.0), draw.uniform(1.0, 9.0)] for _ in range(20)]


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_the_means_of_a_window_that_was_cut_are_those_of_a_whole_one(cut: int) -> None:
    updates = some_updates()
    whole = window()
    train(whole, updates)
    first, again = window(), window()
    train(first, updates[:cut])
    # Of the update that the stop broke off, which will be made again
    first.add(DistillLoss(*torch.tensor([1e9, 1e9, 1e9])))
    state = first.state(ALONE)
    again.restore(state, ALONE)
    assert again.trained_seconds() >= state["seconds"] >= 0.0
    train(again, updates[cut:])
    assert again.updates == whole.updates == 20
    assert again.untimed == cut, "updates of the earlier start are in no speed"
    assert again.means(ALONE) == whole.means(ALONE)


def test_each_process_gets_its_own_sums_back_and_the_main_one_all_where_their_number_differs() -> (
    None
):
    parts = [window(), window()]
    train(parts[0], some_updates()[:3])
    train(parts[1], some_updates()[3:6])
    state = parts[0].state(ALONE)
    state["sums"] += parts[1].state(ALONE)["sums"]
    for rank, part in enumerate(parts):
        again = window()
        again.restore(state, Processes(rank=rank, world_size=2))
        assert torch.equal(again.sums, part.sums)
    for rank in range(3):
        other = window()
        other.restore(state, Processes(rank=rank, world_size=3))
        expected = sum(part.sums for part in parts) if rank == 0 else torch.zeros(2, 4)
        assert torch.equal(other.sums, torch.as_tensor(expected))
        assert other.updates == 3


def test_a_snapshot_of_an_older_release_leaves_a_new_window() -> None:
    again = window()
    again.restore({}, ALONE)
    assert again.updates == 0
    assert again.means(ALONE) == {}
