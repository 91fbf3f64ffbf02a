"""What a run looks at before its first request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from constitution.principles import Constitution
from pipeline import checks
from pipeline.chain import prepare
from pipeline.config.settings import Settings
from pipeline.errors import EngineRefused, ResourceError
from pipeline.jobs import Job
from pipeline.store import RunFolder
from tests.pipeline.lm.tiny import CHATML, tiny_llama, tiny_tokenizer
from tests.support import Command, Server, write_prompts


def refuse(max_turns: int) -> str:
    """A chat template that takes at most so many turns."""
    return f"{{% if messages|length > {max_turns} %}}{{{{ raise_exception('too many turns') }}}}{{% endif %}}" + CHATML


@pytest.mark.parametrize("max_turns", [1, 4])
def test_a_template_that_refuses_what_a_stage_asks_ends_the_run_before_anything_is_asked(
    cai: Command, max_turns: int
) -> None:
    tiny_llama().save_pretrained(cai.folder / "curt")
    tiny_tokenizer(template=refuse(max_turns)).save_pretrained(cai.folder / "curt")
    prompts = write_prompts(cai.folder / "p.jsonl", 2)
    done = cai("run", "-r", "r", "--prompts", prompts, "--model", "curt")
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("cai: ")]
    assert said.startswith("cai: curt: bad_roles: the chat template refuses the turns [user, assistant")
    assert said.endswith("does not take what a run asks; set engine.style: few-shot, or take another model")
    assert not list((cai.folder / "r" / "journal").glob("*"))


def test_a_model_that_cannot_be_opened_leaves_none_of_the_others_open(tmp_path: Path) -> None:
    settings = Settings.model_validate({"engine": {"model": "nano"}, "judge": {"model": str(tmp_path)}})
    job = Job(RunFolder(tmp_path / "r", create=True), settings, Constitution.default())
    before = threading.active_count()
    with pytest.raises(EngineRefused, match=r"no config\.json"):
        prepare(job, ("generate", "critique-revise"))
    assert threading.active_count() == before


def test_a_context_that_leaves_no_room_for_replies_is_said(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 1)
    options = ("--model", "nano", "--prompts", prompts, "--set", "engine.context=120")
    done = cai("generate", "-r", "r", *options)
    assert done.returncode == 0, done.stderr
    assert "nano: requests: tokens: draft 47; 73 of 96 tokens are left for a reply to the longest" in done.stderr
    done = cai("generate", "-r", "r", *options, "--set", "generate.max_tokens=60")
    assert "nano: requests" not in done.stderr


def test_a_context_without_any_room_ends_the_run_before_anything_is_asked(cai: Command) -> None:
    prompts = write_prompts(cai.folder / "p.jsonl", 1)
    done = cai("run", "-r", "r", "--model", "nano", "--prompts", prompts, "--set", "engine.context=10")
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("cai: nano: requests: tokens: draft 47, ")
    assert said.endswith("none of a context of 10 is left for a reply; raise engine.context, or take another model")
    assert not list((cai.folder / "r" / "journal").glob("*"))


def test_a_disk_without_room_ends_the_run_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "TOO_FEW_BYTES", 1 << 62)
    monkeypatch.setattr(checks, "FEW_BYTES", 1 << 62)
    with pytest.raises(ResourceError, match=r"disk: .* GiB free; free some room"):
        list(checks.preflight(tmp_path, [], Constitution.default(), ()))


def test_the_look_at_the_start_sends_nothing(cai: Command, serve: Callable[..., Server]) -> None:
    server = serve()
    prompts = write_prompts(cai.folder / "p.jsonl", 3)
    assert cai("generate", "-r", "r", "--prompts", prompts, *server.options()).returncode == 0
    assert server.num_received() == 3 * 2
