"""Copies of a run's state in the host's memory, which a snapshot is written from."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from trainer.runtime.sharding import full_tensor


class StateCopies:
    """Copies the state; the memory of a copy that nobody needs any more serves the next one.

    Most of a copy's time goes to memory that the system hands out page by page: written to again,
    it takes a fraction of that. One copy is kept for this, as large as the state itself.
    """

    def __init__(self) -> None:
        self._free: Any = None

    def copy(self, state: Any) -> Any:
        """A copy on the CPU of nested dicts, lists and tensors, independent of later updates.

        Sharded tensors are put together, for which every other process has to call `gather`.
        """
        free, self._free = self._free, None
        return _copied(state, free)

    def free_with(self, owner: object, copy: Any) -> None:
        """Take a copy's memory back when ``owner`` is gone, which alone refers to the copy."""
        weakref.finalize(owner, self._take_back, copy).atexit = False

    def _take_back(self, copy: Any) -> None:
        self._free = copy


def gather(state: Any) -> None:
    """Take part in putting sharded tensors together, and keep nothing."""
    if isinstance(state, Tensor):
        full_tensor(state.detach())
    elif isinstance(state, dict):
        gather(list(state.values()))
    elif isinstance(state, list | tuple):
        for entry in state:
            gather(entry)


def _copied(value: Any, free: Any) -> Any:
    """A copy of ``value``, in the memory of ``free`` where it is built alike."""
    if isinstance(value, Tensor):
        whole = full_tensor(value.detach())
        if isinstance(free, Tensor) and (free.shape, free.dtype) == (whole.shape, whole.dtype):
            return free.copy_(whole)
        return whole.to("cpu", copy=True)
    if isinstance(value, dict):
        entries = free if isinstance(free, dict) else {}
        return {key: _copied(entry, entries.get(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        alike = isinstance(free, list | tuple) and len(free) == len(value)
        parts = free if alike else [None] * len(value)
        return type(value)(_copied(*pair) for pair in zip(value, parts, strict=True))
    return value
