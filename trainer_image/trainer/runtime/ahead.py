"""Work that begins before its result is needed."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Ahead(Generic[Result]):
    """Work in a thread of its own, begun at once; `result` waits for it.

    The thread is a daemon: a process that ends without the result does not wait for it. Such work
    imports nothing that the caller may be importing meanwhile, for packages whose modules import
    each other in a circle are half made then.

    Args:
        name: of the thread.
        work: what it does.
    """

    def __init__(self, name: str, work: Callable[[], Result]) -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def result(self) -> Result:
        """What the work gave; raises what it raised."""
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def importing(self, modules: Iterable[str]) -> Result:
        """As `result`, and imports meanwhile: as many modules as there is time to begin."""
        for name in modules:
            if not self._thread.is_alive():
                break
            with contextlib.suppress(ImportError):  # told where it is needed
                importlib.import_module(name)
        return self.result()

    def _run(self) -> None:
        try:
            self._outcome: Result | BaseException = self._work()
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            self._outcome = error
