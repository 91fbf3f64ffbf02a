"""What a script says to a request: a pure function of the request's content and of how often it was asked before."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from constitution import yamlfile
from pipeline.engines.base import Usage
from pipeline.engines.wire import Body
from pipeline.errors import UsageError
from pipeline.records import digest

TRANSPORT_FIELDS = frozenset({"stream", "stream_options", "user", "metadata", "store", "service_tier"})
_WORD = re.compile(r"\w+")
_VOCABULARY = _WORD.findall(
    "careful plain honest steady small early open quiet useful gentle clear warm short simple patient direct river "
    "garden window kettle letter bridge lantern market harbour orchard ladder teacher neighbour doctor library "
    "notebook asks keeps shows brings finds names lifts turns carries opens explains answers begins checks near under "
    "after before beside without again together often slowly first today because while"
)
# Two texts to compare: each begins at a line "(A) ..." or after a line that ends in "answer A"; the second ends before
# a section mark or with the prompt.
_PAIR = re.compile(
    r"(?ms)^(?:\W{0,4}A\)|[^\n]{0,40}\banswer A:?$)(?P<a>.*?)"
    r"^(?:\W{0,4}B\)|[^\n]{0,40}\banswer B:?$)(?P<b>.*?)(?=^~:~|\Z)"
)
_OFFERED = re.compile(r"\b1\b[^\n]{1,20}\b10\b|\bA or B\b|\bYes or No\b|\byes or no\b")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fault(_Strict):
    """One way to misbehave.

    rate: the share of (content, try) pairs it hits. first: only the first so many times that a content is asked.
    """

    kind: Literal[
        "status", "reset", "hang", "drip", "html", "cut_json", "cut_body", "choices", "no_logprobs",
        "empty", "reasoning_only", "length", "content_filter", "odd_text",
    ]  # fmt: skip
    rate: float = Field(default=1.0, ge=0, le=1)
    first: int | None = Field(default=None, ge=1)
    status: int = Field(default=500, ge=300, le=599)
    code: str = ""
    message: str = "scripted fault"
    retry_after: str = ""
    retry_after_date_s: float | None = None
    retry_after_ms: int | None = None
    every_s: float = Field(default=10.0, gt=0)
    choices: int = Field(default=2, ge=0)
    odd: Literal["surrogate", "nul", "line_separator"] = "surrogate"


Latency = float | tuple[float, float]


class Rule(_Strict):
    """Which requests it is for (all conditions hold; patterns are searched), and what they get."""

    last: re.Pattern[str] | None = None
    prompt: re.Pattern[str] | None = None
    model: re.Pattern[str] | None = None
    asks: Literal["labels", "text"] | None = None
    text: str | Annotated[list[str], Field(min_length=1)] = "{words}"
    labels: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None
    finish_reason: Literal["stop", "length", "content_filter"] = "stop"
    reasoning: str = ""
    latency_s: Latency | None = None
    faults: tuple[Fault, ...] = ()


class Script(_Strict):
    """A whole script; the empty one is the default.

    models: served names, empty for any. owned_by: what the list of models says of them; real servers give their own
    name there. context: longest prompt plus reply, in white-space words. token_ids: what becomes of a request for the
    log-probabilities of given tokens; with none there is no /tokenize either.
    """

    models: tuple[str, ...] = ()
    owned_by: str = "scripted"
    context: int | None = Field(default=None, ge=1)
    salt: str = ""
    latency_s: Latency = 0.0
    digits: Literal["whole", "split"] = "whole"
    token_ids: Literal["none", "read", "refused", "ignored"] = "none"
    faults: tuple[Fault, ...] = ()
    rules: tuple[Rule, ...] = ()


def load_script(path: str | Path) -> Script:
    """Reads a YAML or JSON script. UsageError, with file and place, also for duplicate keys and aliases."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        if content is None:
            return Script()
        yamlfile.parse(text, str(path))
        return Script.model_validate(content)
    except yamlfile.ConstitutionError as error:
        raise UsageError(f"{error}; see docs/scripted.md") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}; see docs/scripted.md") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "top level"
        raise UsageError(f"{path}: {place}: {first['msg']}; see docs/scripted.md") from error


class Answer(NamedTuple):
    """What the script says to one request.

    logprobs: label -> natural log of its probability, None where text was asked for. fault: what goes wrong, or None.
    """

    key: str
    text: str
    finish_reason: str
    logprobs: dict[str, float] | None
    reasoning: str
    latency_s: float
    fault: Fault | None
    usage: Usage


def content_key(body: Body) -> str:
    """sha256 of the canonical JSON of a body without its transport fields, in hex."""
    return digest({name: value for name, value in body.items() if name not in TRANSPORT_FIELDS})


def answer(script: Script, body: Body, key: str, asked_before: int, labels: tuple[str, ...] = ()) -> Answer:
    """The script's answer to a request body.

    labels: as asked for; () to read them off the question, for the protocol does not carry them.
    """
    prompt, last = _texts(body)
    asks_labels = bool(body.get("logprobs"))
    rule, match = _find_rule(script, prompt, last, body["model"], asks_labels)
    salted = script.salt + key
    fault = _find_fault((*script.faults, *rule.faults), salted, asked_before)
    latency_s = rule.latency_s if rule.latency_s is not None else script.latency_s
    if not isinstance(latency_s, float):
        latency_s = latency_s[0] + (latency_s[1] - latency_s[0]) * _uniform(salted, "latency")
    num_prompt = len(prompt.split())
    if asks_labels:
        probabilities = rule.labels
        if probabilities is None:
            probabilities = _judge(salted, prompt, labels or labels_in(last))
        wanted = labels or tuple(probabilities)
        logprobs = {x: math.log(probabilities[x]) for x in wanted if probabilities.get(x, 0) > 0}
        return Answer(key, "", "stop", logprobs, "", latency_s, fault, Usage(num_prompt, 1))
    template = _choose(rule.text, salted)
    if "{label}" in template:
        match = {**match, "label": _draw_label(salted, rule.labels or _judge(salted, prompt, labels_in(last)))}
    text = _fill(template, salted, last, body, match)
    text, finish_reason = _cut(text, body.get("max_tokens") or 0, rule.finish_reason)
    usage = Usage(num_prompt, len(text.split()))
    return Answer(key, text, finish_reason, None, rule.reasoning, latency_s, fault, usage)


def labels_in(last: str) -> tuple[str, ...]:
    """The labels that a question offers: A or B, Yes or No, 1 to 10; else the letters in (A), (B); else Yes, No."""
    offers = _OFFERED.findall(last)
    if not offers:
        letters = sorted(set(re.findall(r"\(([A-H])\)", last)))
        return tuple(letters) if len(letters) >= 2 else ("Yes", "No")
    if offers[-1].startswith("1"):
        return tuple(map(str, range(1, 11)))
    first, _, second = offers[-1].split()
    return (first, second)


def _texts(body: Body) -> tuple[str, str]:
    """The whole prompt as text, and its last message; both are the prompt itself where it is raw text."""
    if isinstance(body.get("prompt"), str):
        return body["prompt"], body["prompt"]
    contents = [(message["role"], _plain(message.get("content"))) for message in body["messages"]]
    return "\n\n".join(f"{role}: {content}" for role, content in contents), contents[-1][1]


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _find_rule(script: Script, prompt: str, last: str, model: str, asks_labels: bool) -> tuple[Rule, dict[str, str]]:
    """The first rule that fits, and its patterns' named groups."""
    for rule in script.rules:
        if rule.asks is not None and (rule.asks == "labels") != asks_labels:
            continue
        groups: dict[str, str] = {}
        for pattern, text in ((rule.last, last), (rule.prompt, prompt), (rule.model, model)):
            match = pattern.search(text) if pattern else None
            if pattern and not match:
                break
            groups |= {k: v or "" for k, v in match.groupdict().items()} if match else {}
        else:
            return rule, groups
    return _DEFAULT_RULE, {}


def _find_fault(faults: tuple[Fault, ...], salted: str, asked_before: int) -> Fault | None:
    for place, fault in enumerate(faults):
        if fault.first is not None and asked_before >= fault.first:
            continue
        if fault.rate == 1.0 or _uniform(salted, f"fault/{place}/{asked_before}") < fault.rate:
            return fault
    return None


def _uniform(*parts: str) -> float:
    """A number in [0, 1) from a hash of the parts."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big") / 2**64


def _choose(text: str | list[str], salted: str) -> str:
    return text if isinstance(text, str) else text[int(_uniform(salted, "text") * len(text))]


def _fill(template: str, salted: str, last: str, body: Body, groups: dict[str, str]) -> str:
    """Placeholders in one pass; an unknown name in braces stays as it is."""
    if template == "{words}":
        return _words(salted)
    values = {"hash": salted[-64:], "hash8": salted[-64:-56], "last": last, "model": body["model"]}
    values |= {"seed": str(body.get("seed", "")), **groups}

    def value(match: re.Match[str]) -> str:
        return _words(salted) if match[1] == "words" else values.get(match[1], match[0])

    return re.sub(r"\{(\w+)\}", value, template)


def _draw_label(salted: str, probabilities: dict[str, float]) -> str:
    """A label, drawn by hash; `neither` with what is missing to 1."""
    left = _uniform(salted, "vote")
    for label, probability in probabilities.items():
        left -= probability
        if left < 0:
            return label
    return "neither"


def _words(salted: str) -> str:
    """Two to four sentences of common words; 9 words drawn out of 62 each, so that no two contents share a text."""
    stream = hashlib.sha512(f"{salted}\0words".encode()).digest()
    sentences = []
    for start in range(0, 9 * (2 + stream[-1] % 3), 9):
        words = [_VOCABULARY[byte % len(_VOCABULARY)] for byte in stream[start : start + 9]]
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences)


def _cut(text: str, max_tokens: int, finish_reason: str) -> tuple[str, str]:
    """At most `max_tokens` white-space words (0: all); what is cut ends for `length`."""
    if not max_tokens or len(text.split()) <= max_tokens:
        return text, finish_reason
    end = list(re.finditer(r"\S+", text))[max_tokens - 1].end()
    return text[:end], "length"


def _judge(salted: str, prompt: str, labels: tuple[str, ...]) -> dict[str, float]:
    """Probabilities of the labels, 0.98 together.

    For A against B: logistic of the difference of the two texts' qualities plus a little noise that the order changes,
    so that both orders mostly agree and some do not. For other labels: from a hash of the whole request.
    """
    pairs = list(_PAIR.finditer(prompt)) if sorted(labels) == ["A", "B"] else []
    if pairs:
        pair = pairs[-1]
        noise = _uniform(salted, "noise") - 0.5
        logit = _quality(pair["a"]) - _quality(pair["b"]) + noise
        weights = [math.exp(logit / 2 if label == "A" else -logit / 2) for label in labels]
    else:
        weights = [math.exp(4 * _uniform(salted, "label", label)) for label in labels]
    return {label: 0.98 * weight / sum(weights) for label, weight in zip(labels, weights, strict=True)}


def _quality(text: str) -> float:
    """A text's quality, about N(0, 1): the normalised sum of a hash of each distinct word, little moved by fences.

    The sum is one of integers, for the order of a set is another one in every process.
    """
    words = set(_WORD.findall(text))
    total = sum(_word_value(word) for word in words)
    return total / 2**32 / math.sqrt(len(words) / 12) if words else 0.0


def _word_value(word: str) -> int:
    """A hash of the word, uniform over [-2**31, 2**31)."""
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big", signed=True)


_DEFAULT_RULE = Rule()


def alter(said: Answer, fault: Fault) -> Answer:
    """The answer with a fault of content in it: what the model itself may do, as against the transport."""
    if fault.kind == "empty":
        return said._replace(text="")
    if fault.kind == "reasoning_only":
        return said._replace(text="", reasoning=said.reasoning or said.text, finish_reason="length")
    if fault.kind == "length":
        return said._replace(text=said.text[: len(said.text) // 2], finish_reason="length")
    if fault.kind == "content_filter":
        return said._replace(text="", finish_reason="content_filter")
    if fault.kind == "odd_text":
        odd = {"surrogate": "\ud800", "nul": "\0", "line_separator": "\u2028"}[fault.odd]
        return said._replace(text=said.text + odd)
    return said
