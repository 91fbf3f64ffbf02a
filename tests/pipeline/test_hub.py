"""What is looked up on the hub where there is none, or none that can be reached."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from pipeline import hub
from pipeline.errors import EngineRefused, UsageError
from pipeline.lm.load import load_config, load_tokenizer
from pipeline.sources import Spec, read

NOBODY = "http://127.0.0.1:9"
"""The port that discards what it gets: nobody listens there."""


@pytest.fixture
def refusing() -> Iterator[str]:
    """A server that has nothing, at its address."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_hub_that_answers_anything_is_reachable(refusing: str) -> None:
    assert hub.answers(refusing)
    assert not hub.answers(NOBODY)


def test_without_a_network_a_model_is_refused_at_once_and_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hub's client would try each file six times, and tell of each on stderr."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    began = time.perf_counter()
    for look_up in (load_config, load_tokenizer):
        with pytest.raises(EngineRefused, match=r"^model nobody/nothing: .*the hub cannot be reached.*check its name"):
            look_up("nobody/nothing")
    with pytest.raises(UsageError, match="hf:nobody/nothing: the hub cannot be reached; check the network"):
        next(read(Spec("hf:nobody/nothing")))
    assert time.perf_counter() - began < 5
    assert capfd.readouterr().err == ""
