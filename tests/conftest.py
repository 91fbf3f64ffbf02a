"""Fixtures for tests of whole runs; see support.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import Command, Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The demo takes longest by far: whoever runs tests side by side should not find it at the end."""
    items.sort(key=lambda item: item.path.name != "test_demo.py")


@pytest.fixture
def cai(tmp_path: Path) -> Command:
    """The installed command, called in the test's own folder."""
    return Command(tmp_path)


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts scripted servers; they end with the test."""
    servers: list[Server] = []

    def start(script: str = "") -> Server:
        servers.append(Server(tmp_path_factory.mktemp("server"), script))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
