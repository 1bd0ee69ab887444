"""What the tests share: a real object server and buckets in it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before pytest's own entries: tests/trainer must not be taken for the package `trainer`
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "trainer_image"))

from tests.faults.proxy import FaultProxy
from tests.faults.server import ObjectServer

_numbers = itertools.count(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long forms out unless `-m` names them."""
    if "soak" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """fake-gcs-server, for the whole session."""
    server = ObjectServer(tmp_path_factory.mktemp("object-server"))
    yield server
    server.close()


@pytest.fixture
def gcs_proxy(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The way to the server that clients of this test and its subprocesses take.

    Injects nothing until its `faults` or `bandwidth` are set.
    """
    with FaultProxy(object_server.url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        yield proxy


@pytest.fixture
def gcs_bucket(gcs_proxy: FaultProxy, object_server: ObjectServer) -> str:
    """The URI of a new, empty bucket."""
    name = f"bucket-{next(_numbers)}"
    object_server.make_bucket(name)
    return f"gs://{name}"
