"""An engine that answers from a script: deterministic, offline, misbehaves as asked. Its contract: docs/scripted.md.

Every answer is a function of the request's content (its body as in the OpenAI protocol) and, where a fault asks for it,
of how often this content was asked before; never of arrival order or time. The same answers come from the engine in
process and from the HTTP server (`python -m pipeline.engines.scripted --port P --script FILE --ledger FILE`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from pathlib import Path

from pipeline.arguments import Arguments, one_line
from pipeline.engines.base import Reply, Request
from pipeline.engines.scripted_answers import Answer, Fault, Script, alter, answer, content_key, load_script
from pipeline.engines.votes import ask_votes
from pipeline.engines.wire import REQUEST_STATUSES, RETRIED_STATUSES, request_body
from pipeline.errors import EngineDown, EngineRefused, RequestFailed
from pipeline.records import canonical

__all__ = ["Script", "ScriptedEngine", "load_script"]


class ScriptedEngine:
    """`engines.base.Engine` in process. fingerprint: the script's content."""

    context: int | None

    def __init__(
        self, script: Script | str | Path | None = None, *, concurrency: int = 64, name: str = "scripted"
    ) -> None:
        if isinstance(script, str | Path):
            script = load_script(script)
        self.script = script or Script()
        if self.script.models and name not in self.script.models:
            raise EngineRefused(f"scripted: no model {name!r} in the script; it serves {', '.join(self.script.models)}")
        self.name = name
        self.context = self.script.context
        self.concurrency = concurrency
        self.fingerprint = {"backend": "scripted", "model": name, "script": _script_digest(self.script)}
        self.neutralised = 0
        self._has_faults = bool(self.script.faults or any(rule.faults for rule in self.script.rules))
        self._asked: Counter[str] = Counter()

    @property
    def running(self) -> int:
        return self.concurrency

    async def start(self) -> None:
        """Ready since it was made."""

    async def ask(self, request: Request, priority: int = 0) -> Reply:
        """Answers at once or after the script's latency; faults of the transport become the errors they end in."""
        body, escaped = request_body(request, self.name)
        self.neutralised += escaped
        key = content_key(body)
        said = answer(self.script, body, key, self._asked[key], request.labels)
        if self._has_faults:
            self._asked[key] += 1
        if said.latency_s:
            await asyncio.sleep(said.latency_s)
        if self.context is not None and said.usage.prompt_tokens + body["max_tokens"] > self.context:
            raise RequestFailed("too_long", f"{said.usage.prompt_tokens} words and {body['max_tokens']} to come")
        if said.fault and said.fault.kind == "no_logprobs" and request.labels:
            return await ask_votes(request, self.ask)
        if said.fault:
            said = await _suffer(said, said.fault)
        if said.logprobs is not None:
            return Reply("", "labels", (), said.logprobs, "topk", usage=said.usage)
        return Reply(said.text, said.finish_reason, reasoning=said.reasoning, usage=said.usage)

    async def close(self) -> None:
        """Nothing is held."""


async def _suffer(said: Answer, fault: Fault) -> Answer:
    """What a client would have made of the fault after its retries."""
    if fault.kind == "hang":
        await asyncio.Event().wait()
    if fault.kind == "drip":
        raise RequestFailed("timeout", "scripted fault: one byte at a time")
    if fault.kind == "reset" or (fault.kind == "status" and fault.status in RETRIED_STATUSES):
        raise EngineDown(f"scripted: {fault.kind} {fault.status if fault.kind == 'status' else ''}".rstrip())
    if fault.kind == "status" and fault.status in REQUEST_STATUSES:
        too_long = fault.code == "context_length_exceeded"
        raise RequestFailed("too_long" if too_long else REQUEST_STATUSES[fault.status], fault.message)
    if fault.kind == "status":
        raise EngineRefused(f"scripted: status {fault.status}; see the script's faults")
    if fault.kind in ("html", "cut_json", "cut_body", "choices"):
        raise RequestFailed("bad_reply", f"scripted fault: {fault.kind}")
    said = alter(said, fault)
    if "\ud800" in said.text:
        raise RequestFailed("bad_reply", "scripted fault: lone surrogate")
    return said


def _script_digest(script: Script) -> str:
    return hashlib.sha256(canonical(json.loads(script.model_dump_json()))).hexdigest()


def main() -> None:
    """Runs the HTTP server until SIGTERM or SIGINT."""
    parser = Arguments("pipeline.engines.scripted", __doc__)
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 picks a free one")
    parser.add_argument("--script", type=Path, help="YAML or JSON, see docs/scripted.md; none: the default script")
    parser.add_argument("--ledger", type=Path, help="JSON lines, appended: every request received and answered")
    options = parser.parse_args()
    from pipeline.engines.scripted_server import serve

    with one_line():
        script = load_script(options.script) if options.script else Script()
        asyncio.run(serve(script, port=options.port, ledger=options.ledger))


if __name__ == "__main__":
    main()
