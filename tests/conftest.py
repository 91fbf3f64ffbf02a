"""Fixtures for tests of whole runs; see support.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import Command, Server

_LONGEST = ("demo", "real_input", "recipe", "ranks", "ppo_ranks", "readme")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that of processes side by side none is alone with one at the end."""
    places = {f"test_{name}.py": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


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
