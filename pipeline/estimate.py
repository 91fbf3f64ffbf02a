"""What a run would ask for: records, requests, tokens, disk, cost, time, counted from its prompts and settings.

Without a model text is counted as four characters a token and replies at the lengths given below, and nobody knows the
time; what was measured on a few prompts (calibrate.py) replaces the guesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from constitution.principles import Constitution
from constitution.ranking import schedule
from pipeline.config.settings import Settings
from pipeline.engines.backends import resolve_backend
from pipeline.engines.votes import MAX_TOKENS as VOTE_TOKENS
from pipeline.engines.votes import NUM_VOTES

CHARACTERS_PER_TOKEN = 4.0
BYTES_PER_REPLY = 250
"""Of the journal and the parts, besides the text itself."""
REPLY_SHARE = 0.3
"""Of max_tokens, what a reply is taken to be long."""
VERDICTS = frozenset({"comparison", "check", "grade"})
"""Kinds of request that are answered with labels."""


class Estimate(NamedTuple):
    """records: prompts; tokens: (in, out) over all requests; disk: bytes of the run folder.

    cost: in the currency of the prices, None without any. seconds: None if nothing was measured. by_votes: the same for
    a judge that gives no log-probabilities; None where it is known which one it is.
    """

    records: int
    requests: dict[str, int]
    tokens_in: int
    tokens_out: int
    disk: int
    cost: float | None
    seconds: float | None
    by_votes: Estimate | None = None


class Call(NamedTuple):
    """One kind of reply of one record: how many; for one of them the tokens in and out, and the requests (votes)."""

    kind: str
    num: float
    tokens_in: float
    tokens_out: float
    requests: float = 1.0


class Measured(NamedTuple):
    """What some records took. seconds_per_reply: with all of them in flight; None if every reply was known."""

    records: int
    calls: tuple[Call, ...]
    seconds_per_reply: float | None


def estimate(
    settings: Settings,
    constitution: Constitution,
    names: Sequence[str],
    *,
    records: int,
    characters: int,
    max_tokens: int,
    measured: Measured | None = None,
) -> Estimate:
    """characters: of all prompts together. max_tokens: of a reply, where the settings do not say."""
    size = {"records": records, "characters": characters}
    if measured:
        return _total(settings, measured.calls, measured.seconds_per_reply, **size)
    prompt = characters / max(records, 1) / CHARACTERS_PER_TOKEN
    calls = tuple(_calls(settings, constitution, names, prompt, max_tokens))
    found = _total(settings, calls, None, **size)
    voted = tuple(_by_votes(call) if call.kind in VERDICTS else call for call in calls)
    if voted == calls or resolve_backend(settings.engine_for(settings.judge)) != "server":
        return found
    return found._replace(by_votes=_total(settings, voted, None, **size))


def _by_votes(call: Call) -> Call:
    return call._replace(
        tokens_in=NUM_VOTES * call.tokens_in, tokens_out=NUM_VOTES * REPLY_SHARE * VOTE_TOKENS, requests=NUM_VOTES
    )


def _total(
    settings: Settings, calls: Sequence[Call], seconds_per_reply: float | None, *, records: int, characters: int
) -> Estimate:
    requests: dict[str, int] = {}
    for call in calls:
        requests[call.kind] = requests.get(call.kind, 0) + round(records * call.num * call.requests)
    replies = sum(round(records * call.num) for call in calls)
    tokens_in = records * sum(call.num * call.tokens_in for call in calls)
    tokens_out = records * sum(call.num * call.tokens_out for call in calls)
    # Every reply stands in the journal and in a part, its prompt in none of them.
    disk = 2 * (characters + int(tokens_out * CHARACTERS_PER_TOKEN) + replies * BYTES_PER_REPLY)
    seconds = None if seconds_per_reply is None else seconds_per_reply * replies
    return Estimate(
        records, requests, round(tokens_in), round(tokens_out), disk, _cost(settings, calls, records), seconds
    )


def total(estimates: Mapping[int, Estimate]) -> Estimate:
    """Of several phases, by number; requests of phase 2 have their phase in the name, and phase 1's pace."""
    voted = any(part.by_votes for part in estimates.values())
    by_votes = _sum({phase: part.by_votes or part for phase, part in estimates.items()}) if voted else None
    return _sum(estimates)._replace(by_votes=by_votes)


def _sum(estimates: Mapping[int, Estimate]) -> Estimate:
    parts = list(estimates.values())
    requests = {
        kind if phase == 1 else f"phase{phase}/{kind}": number
        for phase, part in estimates.items()
        for kind, number in part.requests.items()
    }
    costs = [part.cost for part in parts if part.cost is not None]
    paces = [part.seconds / sum(part.requests.values()) for part in parts if part.seconds is not None]
    return Estimate(
        max(part.records for part in parts),
        requests,
        sum(part.tokens_in for part in parts),
        sum(part.tokens_out for part in parts),
        sum(part.disk for part in parts),
        sum(costs) if costs else None,
        paces[0] * sum(requests.values()) if paces else None,
    )


def num_steps(settings: Settings, trainer: str, prompts: Mapping[tuple[str, int], int]) -> int:
    """The most steps a training takes: every prompt gives all the rows it can.

    prompts: how many there are of each split with so many given answers.
    """
    rows = sum(num * _num_rows(settings, trainer, split, given) for (split, given), num in prompts.items())
    if trainer == "sft" and settings.export.helpful:
        share = settings.export.helpful.share
        rows += round(rows * share / (1 - share))
    section = getattr(settings, f"train_{trainer}")
    return -(-rows // section.batch_size) * section.epochs


def _num_rows(settings: Settings, trainer: str, split: str, given: int) -> int:
    """The most rows that a prompt has for a trainer, in the dataset that it reads."""
    samples, is_preference = _num_samples(settings), split == "preference"
    if split == "test":
        return 0
    if trainer == "ppo":
        return 1
    if trainer == "sft":
        rounds = settings.critique_revise.rounds
        targets = {"best": 1, "last": samples, "all": samples * rounds, "improved": samples * rounds}
        return 0 if is_preference else targets[settings.export.sft]
    in_phase_1, in_phase_2 = settings.recipe.pairs != "samples", settings.recipe.pairs != "revisions" and is_preference
    if trainer == "rrhf":
        return in_phase_1 + in_phase_2
    if trainer == "rm":
        return int(is_preference)  # all pairs of a prompt are one row
    pairs_1 = _num_pairs(settings, given + _num_candidates(settings, samples), chains=samples)
    pairs_2 = _num_pairs(settings, settings.generate.samples)
    return is_preference * (in_phase_1 * pairs_1 + in_phase_2 * pairs_2)


def _num_pairs(settings: Settings, candidates: int, *, chains: int = 0) -> int:
    """The most pairs of a prompt: all are of texts that were compared with each other. chains: none in phase 2."""
    if chains and settings.export.pairs == "revision-draft":
        return chains
    if settings.export.pairs != "all" or settings.rank.mode == "graded":
        return int(candidates > 1)
    return min(math.comb(candidates, 2), len(schedule(candidates)) + 1)  # the best and the worst meet in any case


def _num_samples(settings: Settings) -> int:
    return settings.generate.samples * max(1, len(settings.generate.models))


def _num_candidates(settings: Settings, samples: int) -> int:
    """Drafts and their revisions, of which the ranking takes the ends of the chains or all."""
    return samples * (1 + (1 if settings.rank.candidates == "ends" else settings.critique_revise.rounds))


def _cost(settings: Settings, calls: Sequence[Call], records: int) -> float | None:
    """At the price of whom each kind is asked of, of several on average; a model without a price costs nothing."""
    engines = settings.engines.values()
    if all(engine.price_in is None and engine.price_out is None for engine in engines):
        return None
    generators, critics = list(settings.generators.values()), list(settings.critics.values())
    asked = {
        "draft": generators,
        "critique": critics or generators,
        "revision": critics if isinstance(settings.critic, dict) and critics else generators,
    }
    total = 0.0
    for call in calls:
        who = asked.get(call.kind, [settings.engine_for(settings.judge)])
        price_in, price_out = (
            sum(prices) / len(who) / 1e6
            for prices in ([one.price_in or 0.0 for one in who], [one.price_out or 0.0 for one in who])
        )
        total += records * call.num * (call.tokens_in * price_in + call.tokens_out * price_out)
    return total


def _calls(
    settings: Settings, constitution: Constitution, names: Sequence[str], prompt: float, max_tokens: int
) -> Iterator[Call]:
    samples = _num_samples(settings)
    answer = REPLY_SHARE * (settings.generate.max_tokens or max_tokens)
    principle = sum(len(p.comparison) for p in constitution) / len(constitution) / CHARACTERS_PER_TOKEN
    judged = prompt + 2 * answer + principle + 50
    if "generate" in names:
        yield Call("draft", samples, prompt, answer)
    if "critique-revise" in names:
        section = settings.critique_revise
        chains = samples * section.rounds
        if not section.direct:
            yield Call("critique", chains, prompt + answer + principle, answer)
        yield Call("revision", chains, prompt + 2 * answer + 2 * principle, answer)
        if section.verify:
            yield Call("comparison", 2 * chains, judged, 1)
        if section.early_stop:
            yield Call("check", chains * len(constitution.abouts), judged, 1)
    if "rank" in names:
        yield from _rank_calls(settings, constitution, samples, judged, answer, has_chains="critique-revise" in names)


def _rank_calls(
    settings: Settings, constitution: Constitution, samples: int, judged: float, answer: float, *, has_chains: bool
) -> Iterator[Call]:
    candidates = _num_candidates(settings, samples) if has_chains else samples
    principles, orders = _principles_and_orders(settings, constitution)
    if settings.rank.mode == "graded":
        yield Call("grade", candidates * principles, judged, 1)
        pairs = 1
    else:
        pairs = len(schedule(candidates))
    if settings.rank.chain_of_thought:
        yield Call("reasoning", pairs * principles * orders, judged, answer)
    yield Call("comparison", pairs * principles * orders, judged, 1)


def _principles_and_orders(settings: Settings, constitution: Constitution) -> tuple[int, int]:
    """Under how many principles two candidates are compared, and how often under each."""
    principles = len(constitution) if settings.rank.principles == "all" else settings.rank.principles
    return principles, 1 if settings.rank.order == "single" else 2


def live_requests(settings: Settings, constitution: Constitution) -> int:
    """That the live judge gets for an answer of PPO, at most."""
    principles, orders = _principles_and_orders(settings, constitution)
    if settings.train_ppo.reward == "graded":
        return principles
    return principles * orders * (2 if settings.rank.chain_of_thought else 1)
