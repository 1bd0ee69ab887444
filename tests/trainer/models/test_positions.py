from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from trainer.models.positions import RESIZE_METHODS, resize_positions
from trainer.runtime.errors import UsageError

TABLE = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [17, 32, 33, 100])
def test_linear_matches_numpy_in_fp64(length: int) -> None:
    found = resize_positions(TABLE, 16, length, "linear")
    rows = TABLE[:16].double().numpy()
    at = np.linspace(0.0, 15.0, length)
    expected = np.stack([np.interp(at, np.arange(16), rows[:, d]) for d in range(6)], axis=1)
    assert found.shape == (length, 6)
    assert np.allclose(found.numpy(), expected, atol=1e-6)
    assert torch.allclose(found[0], TABLE[0])
    assert torch.allclose(found[-1], TABLE[15])


def test_copy_tiles_the_trained_rows() -> None:
    found = resize_positions(TABLE, 16, 40, "copy")
    assert torch.equal(found[:16], TABLE[:16])
    assert torch.equal(found[16:32], TABLE[:16])
    assert torch.equal(found[32:], TABLE[:8])


@pytest.mark.parametrize("method", ["linear", "copy"])
def test_rows_past_the_trained_ones_take_no_part(method: str) -> None:
    poisoned = TABLE.clone()
    poisoned[16:] = float("nan")
    assert torch.equal(
        resize_positions(poisoned, 16, 64, method), resize_positions(TABLE, 16, 64, method)
    )


def test_enough_trained_rows_stay_as_they_are() -> None:
    assert torch.equal(resize_positions(TABLE, 32, 20), TABLE[:20])
    assert torch.equal(resize_positions(TABLE, 40, 40), TABLE)
    assert torch.equal(resize_positions(TABLE, 1, 3), TABLE[:1].expand(3, -1))


@pytest.mark.parametrize(
    ("trained", "length", "method"),
    [(0, 8, "linear"), (41, 80, "linear"), (8, 0, "copy"), (8, 9, "x")],
)
def test_impossible_requests_are_refused(trained: int, length: int, method: str) -> None:
    with pytest.raises(UsageError):
        resize_positions(TABLE, trained, length, method)


def test_another_method_is_an_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        RESIZE_METHODS,
        "last",
        lambda rows, length: torch.cat([rows, rows[-1:].expand(length - len(rows), -1)]),
    )
    found = resize_positions(TABLE, 16, 20, "last")
    assert torch.equal(found[:16], TABLE[:16])
    assert torch.equal(found[16:], TABLE[15].expand(4, -1))


def test_settings_take_another_method_and_do_not_import_torch() -> None:
    """In a process of its own: the table is read when the settings are imported."""
    code = """
import sys
from trainer.models.positions import RESIZE_METHODS
RESIZE_METHODS["last"] = lambda rows, length: rows
from trainer.settings.flags import build_parser, settings_from_args
args = build_parser("train", "").parse_args(["--pos_resize=last"])
print(settings_from_args(args), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "{'pos_resize': 'last'} False", done.stderr
