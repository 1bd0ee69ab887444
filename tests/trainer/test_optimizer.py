"""Copies of the state for a snapshot."""

from __future__ import annotations

import pytest
import torch

from trainer.optimizer import to_cpu

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a GPU"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_copy_keeps_its_values_whatever_happens_to_the_original_and_to_other_copies(
    device: str,
) -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0, device=device), "name": "a"}},
        "weights": [
            torch.randn(1000, 1000, device=device),
            torch.arange(6, device=device).view(2, 3).T,
        ],
        "betas": (0.9, 0.95),
    }
    copies, expected = [], []
    for number in range(4):
        expected.append([state["weights"][0].tolist(), float(state["state"][0]["step"])])  # type: ignore[call-overload, index]
        copies.append(to_cpu(state))
        state["weights"][0].add_(1.0)  # type: ignore[index]
        state["state"][0]["step"].add_(1.0)  # type: ignore[index]
        if number == 1:
            # Its memory may serve the next copy, but nobody else's
            copies[0] = None
    assert copies.pop(0) is None
    for copy, (weights, step) in zip(copies, expected[1:], strict=True):
        assert copy["weights"][0].tolist() == weights
        assert float(copy["state"][0]["step"]) == step
        assert copy["weights"][1].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert copy["betas"] == (0.9, 0.95)
        assert copy["state"][0]["name"] == "a"
        assert all(part.device.type == "cpu" for part in copy["weights"])
