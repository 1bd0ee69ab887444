"""Copies of the state for a snapshot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.checkpoints.state_copies import StateCopies

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU"),
    ],
)


class Owner:
    """Holds a copy, as a snapshot does."""

    def __init__(self, copies: StateCopies, state: dict[str, Any]) -> None:
        self.copy = copies.copy(state)
        copies.free_with(self, self.copy)


def addresses(copy: dict[str, Any]) -> list[int]:
    return [tensor.data_ptr() for tensor in (*copy["weights"], copy["state"][0]["step"])]


@pytest.fixture(params=["cpu", GPU])
def state(request: pytest.FixtureRequest) -> dict[str, Any]:
    device = request.param
    return {
        "state": {0: {"step": torch.tensor(3.0, device=device), "name": "a"}},
        "weights": [
            torch.randn(1000, 1000, device=device),
            torch.arange(6, device=device).view(2, 3).T,
        ],
        "betas": (0.9, 0.95),
    }


def test_a_copy_keeps_its_values_whatever_happens_to_the_original_and_to_other_copies(
    state: dict[str, Any],
) -> None:
    copies = StateCopies()
    owners: list[Owner | None] = []
    expected = []
    for number in range(5):
        expected.append((state["weights"][0].tolist(), float(state["state"][0]["step"])))
        owners.append(Owner(copies, state))
        state["weights"][0].add_(1.0)
        state["state"][0]["step"].add_(1.0)
        if number == 1:
            owners[0] = None  # its memory may serve the next copy, but no later one
    for owner, (weights, step) in zip(owners[1:], expected[1:], strict=True):
        assert owner is not None
        copy = owner.copy
        assert copy["weights"][0].tolist() == weights
        assert float(copy["state"][0]["step"]) == step
        assert copy["weights"][1].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert copy["betas"] == (0.9, 0.95)
        assert copy["state"][0]["name"] == "a"
        assert all(part.device.type == "cpu" for part in copy["weights"])


def test_memory_is_used_again_only_after_its_owner(state: dict[str, Any]) -> None:
    copies = StateCopies()
    first, second = Owner(copies, state), Owner(copies, state)
    used = addresses(first.copy)
    assert not set(used) & set(addresses(second.copy))
    del first
    third = Owner(copies, state)
    assert addresses(third.copy) == used
    assert not set(addresses(Owner(copies, state).copy)) & set(used)


def test_a_state_of_another_shape_gets_its_own_memory(state: dict[str, Any]) -> None:
    copies = StateCopies()
    del Owner(copies, state).copy
    state["weights"] = [torch.ones(2, 2), torch.ones(3, 2, dtype=torch.float64), torch.ones(1)]
    state["state"] = {}
    copy = Owner(copies, state).copy
    assert [part.tolist() for part in copy["weights"]] == [
        [[1.0, 1.0]] * 2,
        [[1.0, 1.0]] * 3,
        [1.0],
    ]
    assert copy["weights"][1].dtype == torch.float64
    assert copy["state"] == {}
