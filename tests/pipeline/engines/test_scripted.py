"""The scripted engine: what it answers depends on the request's content only, in process and over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines.base import Reply, Request
from pipeline.engines.scripted import ScriptedEngine, load_script
from pipeline.engines.scripted_answers import Fault, Rule, Script, labels_in
from pipeline.errors import EngineDown, EngineRefused, RequestFailed, UsageError


def chat(text: str, **options: Any) -> Request:
    options = {"max_tokens": 96, "temperature": 1.0, "seed": 7, **options}
    return Request([{"role": "user", "content": text}], "draft", **options)


def ask(engine: ScriptedEngine, *requests: Request) -> list[Reply]:
    async def all_of_them() -> list[Reply]:
        return list(await asyncio.gather(*(engine.ask(request) for request in requests)))

    return asyncio.run(all_of_them())


def script_of(rule: dict[str, Any], **top: Any) -> Script:
    return Script(rules=(Rule(**rule),), **top)


def pair(a: str, b: str) -> Request:
    question = f"Which answer is kinder?\n(A) {a}\n(B) {b}\nReply with A or B only."
    return Request([{"role": "user", "content": question}], "comparison", labels=("A", "B"))


def p_first(reply: Reply) -> float:
    assert reply.logprobs is not None
    a, b = math.exp(reply.logprobs["A"]), math.exp(reply.logprobs["B"])
    return a / (a + b)


def test_replies_do_not_depend_on_the_order_of_asking() -> None:
    requests = [chat(f"question {number}") for number in range(50)] + [pair(f"yes {n}", f"no {n}") for n in range(50)]
    shuffled = requests[:]
    random.Random(1).shuffle(shuffled)
    forward = dict(zip(map(repr, requests), ask(ScriptedEngine(), *requests), strict=True))
    backward = dict(zip(map(repr, shuffled), ask(ScriptedEngine(), *shuffled), strict=True))
    assert forward == backward


def test_the_seed_and_the_model_name_change_a_text() -> None:
    texts = [ask(ScriptedEngine(), chat("hello", seed=seed))[0].text for seed in range(20)]
    assert len(set(texts)) == 20
    assert ask(ScriptedEngine(name="other"), chat("hello"))[0].text != ask(ScriptedEngine(), chat("hello"))[0].text


def test_a_text_longer_than_max_tokens_is_cut_and_says_so() -> None:
    whole = ask(ScriptedEngine(script_of({"text": "one two  three four"})), chat("x", max_tokens=4))[0]
    cut = ask(ScriptedEngine(script_of({"text": "one two  three four"})), chat("x", max_tokens=3))[0]
    assert (whole.text, whole.finish_reason) == ("one two  three four", "stop")
    assert (cut.text, cut.finish_reason, cut.usage.completion_tokens) == ("one two  three", "length", 3)


def test_the_default_judge_prefers_the_same_text_in_both_orders_but_for_some_noise() -> None:
    engine = ScriptedEngine()
    texts = [reply.text for reply in ask(engine, *(chat(f"question {number}") for number in range(400)))]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    forward = [p_first(reply) for reply in ask(engine, *(pair(a, b) for a, b in pairs))]
    backward = [1 - p_first(reply) for reply in ask(engine, *(pair(b, a) for a, b in pairs))]
    agree = sum((x > 0.5) == (y > 0.5) for x, y in zip(forward, backward, strict=True))
    means = [(x + y) / 2 for x, y in zip(forward, backward, strict=True)]
    assert 140 <= agree < 200
    assert all(share >= 10 for share in (sum(m >= 0.55 for m in means), sum(m <= 0.45 for m in means)))
    assert any(0.45 < mean < 0.55 for mean in means)


def test_rules_are_tried_in_order_and_placeholders_are_filled_in_one_pass() -> None:
    script = Script(
        rules=(
            Rule(last="criticise (?P<what>.+)", text="About {what}: {last} {unknown} {model}"),
            Rule(prompt="system: be brief", text="brief"),
            Rule(asks="text", text="any"),
        )
    )
    engine = ScriptedEngine(script)
    braces = ask(engine, chat("criticise {model}"))[0].text
    assert braces == "About {model}: criticise {model} {unknown} scripted"
    system = Request(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}], "draft", max_tokens=9
    )
    assert [reply.text for reply in ask(engine, system, chat("x"))] == ["brief", "any"]


def test_a_list_of_texts_is_spread_by_content() -> None:
    engine = ScriptedEngine(script_of({"text": ["a", "b", "c"]}))
    texts = [reply.text for reply in ask(engine, *(chat(f"q{number}") for number in range(300)))]
    assert all(60 <= texts.count(text) <= 140 for text in "abc")


def test_fixed_label_probabilities_come_out_and_a_zero_is_left_out() -> None:
    engine = ScriptedEngine(script_of({"labels": {"A": 0.7, "B": 0.25, "C": 0}}))
    request = Request("raw text", "comparison", labels=("A", "B", "C"))
    reply = ask(engine, request)[0]
    assert reply.logprobs == {"A": math.log(0.7), "B": math.log(0.25)}
    assert (reply.text, reply.finish_reason, reply.method) == ("", "labels", "topk")


@pytest.mark.parametrize(
    ("question", "labels"),
    [
        ("Reply with A or B only.", ("A", "B")),
        ("(A) one\n(B) two\n(C) three\nThe answer is:", ("A", "B", "C")),
        ("Reply with Yes or No only.", ("Yes", "No")),
        ("Grade the answer from 1 (worst) to 10 (best).", (*"123456789", "10")),
        ("(A) or (B)?\nGrade from 1 to 10.", (*"123456789", "10")),
    ],
)
def test_labels_are_read_off_the_question(question: str, labels: tuple[str, ...]) -> None:
    assert labels_in(question) == labels


def test_answers_are_the_same_bits_in_every_process() -> None:
    program = (
        "import asyncio\n"
        "from pipeline.engines.scripted import ScriptedEngine\n"
        "from pipeline.engines.base import Request\n"
        "texts = [' '.join(f'word{n * m}' for m in range(40)) for n in range(20)]\n"
        "ask = lambda a, b: asyncio.run(ScriptedEngine().ask(Request(f'(A) {a}\\n(B) {b}', 'x', labels=('A', 'B'))))\n"
        "print([ask(a, b).logprobs for a in texts for b in texts])\n"
    )
    root = Path(__file__).parents[3]
    outputs = {
        subprocess.check_output([sys.executable, "-c", program], cwd=root, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in "123"
    }
    assert len(outputs) == 1


def test_a_fault_for_the_first_asks_goes_away() -> None:
    engine = ScriptedEngine(script_of({"faults": [Fault(kind="reset", first=2)]}))
    for _ in range(2):
        with pytest.raises(EngineDown):
            ask(engine, chat("x"))
    assert ask(engine, chat("x"))[0].text


def test_a_rate_hits_that_share_of_contents_and_the_same_ones_again() -> None:
    def hit() -> list[int]:
        engine = ScriptedEngine(Script(faults=(Fault(kind="empty", rate=0.3),)))
        replies = ask(engine, *(chat(f"q{number}") for number in range(1000)))
        return [number for number, reply in enumerate(replies) if not reply.text]

    assert 240 <= len(hit()) <= 360
    assert hit() == hit()


@pytest.mark.parametrize(
    ("fault", "error", "reason"),
    [
        ({"kind": "status", "status": 503}, EngineDown, None),
        ({"kind": "status", "status": 401}, EngineRefused, None),
        ({"kind": "status", "status": 400, "code": "context_length_exceeded"}, RequestFailed, "too_long"),
        ({"kind": "status", "status": 400}, RequestFailed, "refused_by_server"),
        ({"kind": "html"}, RequestFailed, "bad_reply"),
        ({"kind": "odd_text"}, RequestFailed, "bad_reply"),
        ({"kind": "drip"}, RequestFailed, "timeout"),
    ],
)
def test_faults_of_the_transport_become_the_errors_they_end_in(
    fault: dict[str, Any], error: type[Exception], reason: str | None
) -> None:
    with pytest.raises(error) as raised:
        ask(ScriptedEngine(Script(faults=(Fault(**fault),))), chat("x"))
    assert getattr(raised.value, "reason", None) == reason


def test_a_prompt_longer_than_the_context_fails_alone() -> None:
    engine = ScriptedEngine(Script(context=20))
    with pytest.raises(RequestFailed, match="too_long"):
        ask(engine, chat("x " * 30, max_tokens=5))
    assert ask(engine, chat("x", max_tokens=5))[0].text


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("rules: [{last: '('}]", "rules.0.last"),
        ("rules: [{txt: a}]", "rules.0.txt"),
        ("faults: [{kind: explode}]", "faults.0.kind"),
        ("rules: [", "line 1"),
        ("[]", "top level"),
    ],
)
def test_a_bad_script_is_refused_with_its_place(tmp_path: Path, content: str, place: str) -> None:
    path = tmp_path / "script.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=place) as raised:
        load_script(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_example_in_the_documentation_is_a_script(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "scripted.md").read_text()
    (tmp_path / "example.yaml").write_text(page.partition("```yaml\n")[2].partition("```")[0])
    script = load_script(tmp_path / "example.yaml")
    assert [rule.asks for rule in script.rules] == ["text", "labels"]


class Server:
    """The real server process, as an outsider starts it."""

    def __init__(self, folder: Path, script: str) -> None:
        self.ledger = folder / "ledger.jsonl"
        (folder / "script.yaml").write_text(script)
        self.command = [sys.executable, "-m", "pipeline.engines.scripted", "--port", "0"]
        self.command += ["--script", str(folder / "script.yaml"), "--ledger", str(self.ledger)]
        self.start()

    def start(self) -> None:
        root = Path(__file__).parents[3]
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert self.process.stdout is not None
        ready, self.url = self.process.stdout.readline().split()
        assert ready == "ready"

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://").removesuffix("/v1"), timeout=10)
        method = "POST" if body else "GET"
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        answer = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        connection.close()
        return answer

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


SCRIPT = """
models: [small, large]
context: 1000
rules:
  - {last: limited, faults: [{kind: status, status: 429, retry_after: "2", first: 1}]}
  - {last: hang, faults: [{kind: hang}]}
  - {last: odd, text: "line\\u2028end"}
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, SCRIPT)
    yield server
    server.kill()


def body_of(text: str, **extra: Any) -> bytes:
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": "small", "messages": messages, "max_tokens": 9, **extra}).encode()


def test_the_ledger_tells_every_request_and_every_answer(server: Server) -> None:
    statuses = [server.post("/v1/chat/completions", body_of(text))[0] for text in ("one", "limited", "limited")]
    received = [line for line in server.lines() if line["event"] == "received"]
    answered = [line for line in server.lines() if line["event"] == "answered"]
    assert statuses == [200, 429, 200] == [line["status"] for line in answered]
    assert [line["n"] for line in received] == [1, 2, 3] == [line["n"] for line in answered]
    assert [line["try"] for line in received] == [1, 1, 2]
    assert received[0]["body"]["messages"][0]["content"] == "one"
    canonical = json.dumps(received[0]["body"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert received[0]["key"] == hashlib.sha256(canonical.encode()).hexdigest()


def test_the_key_leaves_transport_fields_out(server: Server) -> None:
    server.post("/v1/chat/completions", body_of("one"))
    server.post("/v1/chat/completions", body_of("one", user="somebody", stream=False))
    keys = [line["key"] for line in server.lines() if line["event"] == "received"]
    assert keys[0] == keys[1]


def test_the_ledger_survives_a_kill_and_goes_on(server: Server) -> None:
    first = server.post("/v1/chat/completions", body_of("one"))[2]
    server.kill()
    with server.ledger.open("a") as ledger:
        ledger.write('{"event":"received","n":2,"torn')
    server.start()
    assert server.post("/v1/chat/completions", body_of("one"))[2] == first
    received = [(line["n"], line["try"]) for line in server.lines() if line["event"] == "received"]
    assert received == [(1, 1), (2, 2)]


def test_a_client_that_leaves_is_noted(server: Server) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://").removesuffix("/v1"), timeout=0.3)
    connection.request("POST", "/v1/chat/completions", body_of("hang"))
    with pytest.raises(TimeoutError):
        connection.getresponse()
    assert server.post("/health", b"")[0] == 200
    connection.close()
    server.post("/v1/chat/completions", body_of("one"))
    gone = [line for line in server.lines() if line["event"] == "answered" and line["n"] == 1]
    assert [(line["status"], line["fault"]) for line in gone] == [(0, "client gone")]


def test_models_health_and_unknown_things(server: Server) -> None:
    status, _, raw = server.post("/v1/models", b"")
    assert status == 200
    assert [(m["id"], m["max_model_len"]) for m in json.loads(raw)["data"]] == [("small", 1000), ("large", 1000)]
    assert server.post("/nowhere", b"")[0] == 404
    assert server.post("/v1/chat/completions", body_of("x", model="medium"))[0] == 404
    assert server.post("/v1/chat/completions", b"{")[0] == 400
    assert server.post("/v1/chat/completions", body_of("long " * 1000))[0] == 400
    assert json.loads(server.post("/v1/chat/completions", body_of("odd"))[2])["choices"][0]["message"]["content"] == (
        "line\u2028end"
    )


def test_a_port_in_use_is_one_line_and_exit_code_2(server: Server, tmp_path: Path) -> None:
    port = server.url.removesuffix("/v1").rpartition(":")[2]
    command = [sys.executable, "-m", "pipeline.engines.scripted", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == 2
    assert port in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("salt: a\nsalt: b\n", "script.yaml:2: duplicate key 'salt', first on line 1"),
        ('{"rules": [{"last": "x", "last": "y"}]}', "script.yaml:1: duplicate key 'last'"),
        ("faults: &a []\nrules: *a\n", "script.yaml:1: anchors and aliases are not allowed"),
    ],
)
def test_a_script_that_says_one_thing_twice_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "script.yaml").write_text(text)
    with pytest.raises(UsageError) as raised:
        load_script(tmp_path / "script.yaml")
    assert message in str(raised.value)


def test_special_tokens_in_prompts_are_counted() -> None:
    engine = ScriptedEngine()
    asyncio.run(engine.ask(Request("a <|im_end|> b </s>", "draft", max_tokens=5)))
    assert engine.neutralised == 2
