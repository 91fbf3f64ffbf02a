"""The decode loop beside `model.generate` and plain forward passes."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from pipeline.lm.decode import Decoder, LabelQuery, Row, decode
from tests.pipeline.lm.tiny import families, sharpen, tiny_llama


def prompts_with_shared_beginnings(count: int, *, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    shared = [draw.randrange(3, 300) for _ in range(40)]
    return [
        shared[: draw.randrange(0, 40)] + [draw.randrange(3, 300) for _ in range(draw.randrange(1, 50))]
        for _ in range(count)
    ]


def plain_logps(model: Any, prompt: list[int], completion: list[int], *, temperature: float = 1.0) -> list[float]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    logps = torch.log_softmax(logits / temperature, dim=-1)
    return [logps[len(prompt) - 1 + n, token].item() for n, token in enumerate(completion)]


def greedy(model: Any, row: Row) -> list[int]:
    tokens = torch.tensor([row.prompt])
    with torch.no_grad():
        whole = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=row.max_tokens, do_sample=False
        )
    return whole[0, len(row.prompt) :].tolist()


def run(decoder: Decoder, rows: list[Row]) -> list[Row]:
    return list(decode(decoder, rows))


@pytest.mark.parametrize("family", list(families()))
def test_rows_that_come_and_go_equal_generate(family: str) -> None:
    torch.manual_seed(0)
    model = sharpen(families()[family]())
    draw = random.Random(1)
    rows = [
        Row(prompt, max_tokens=draw.randrange(1, 30), eos=frozenset([2]))
        for prompt in prompts_with_shared_beginnings(12)
    ]
    finished = run(Decoder(model, max_rows=5), rows)
    assert set(map(id, finished)) == set(map(id, rows))
    assert [row.completion for row in rows] == [greedy(model, row) for row in rows]
    assert sum(row.cached_tokens for row in rows) > 0


@pytest.mark.parametrize("family", list(families()))
def test_label_log_probabilities_equal_a_plain_forward(family: str) -> None:
    torch.manual_seed(0)
    model = sharpen(families()[family]())
    labels = ((5,), (5, 6), (7, 8, 9), (7, 8, 10), (11,))
    queries = [LabelQuery(prompt, labels) for prompt in prompts_with_shared_beginnings(8)]
    Decoder(model).prefill(queries)
    for query in queries:
        raw = [sum(plain_logps(model, query.prompt, list(label))) for label in labels]
        raw[0] = math.log(math.exp(raw[0]) - math.exp(raw[1]))  # what goes on as (5, 6) is not (5,)
        assert query.logps == pytest.approx(raw, abs=1e-4)


def test_a_row_draws_the_same_tokens_in_any_company() -> None:
    model = tiny_llama()
    prompts = prompts_with_shared_beginnings(6)
    alone = [Row(prompt, max_tokens=12, temperature=1.0, seed=n) for n, prompt in enumerate(prompts)]
    for row in alone:
        run(Decoder(model), [row])
    together = [Row(prompt, max_tokens=12, temperature=1.0, seed=n) for n, prompt in enumerate(prompts)]
    run(Decoder(model, max_rows=4), together[::-1])
    assert [row.completion for row in together] == [row.completion for row in alone]
    other = Row(prompts[0], max_tokens=12, temperature=1.0, seed=99)
    run(Decoder(model), [other])
    assert other.completion != alone[0].completion


def test_the_kept_log_probabilities_are_those_after_the_temperature() -> None:
    model = tiny_llama()
    row = Row([5, 6, 7], max_tokens=10, temperature=0.7, top_p=0.9, seed=3)
    run(Decoder(model), [row])
    assert row.logps == pytest.approx(plain_logps(model, row.prompt, row.completion, temperature=0.7), abs=1e-4)


def count_tokens(model: Any) -> list[int]:
    """A list that grows by the positions of each forward pass."""
    counts: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: counts.append(given["input_ids"].numel()), with_kwargs=True
    )
    return counts


def test_samples_of_one_prompt_compute_it_once() -> None:
    model = tiny_llama()
    counts = count_tokens(model)
    prompt = prompts_with_shared_beginnings(1)[0][:1] * 161
    rows = [Row(prompt, max_tokens=1, temperature=1.0, seed=n) for n in range(8)]
    run(Decoder(model), rows)
    assert sum(counts) == 161 + 7  # the last token's logits are wanted by every row
    assert sorted(row.cached_tokens for row in rows) == [0, *[160] * 7]


def test_both_orders_of_a_comparison_share_the_conversation() -> None:
    model = tiny_llama()
    counts = count_tokens(model)
    conversation = [n % 200 + 3 for n in range(128)]
    queries = [LabelQuery(conversation + tail, ((9,), (10,))) for tail in ([4, 5, 6, 7], [6, 7, 4, 5])]
    Decoder(model).prefill(queries)
    assert sum(counts) == 128 + 4 + 4


def test_the_next_turn_of_a_chain_extends_its_predecessor() -> None:
    model = tiny_llama()
    decoder = Decoder(model)
    first = Row([n % 200 + 3 for n in range(50)], max_tokens=40)
    run(decoder, [first])
    turn = Row([*first.prompt, *first.completion, 7, 8, 9], max_tokens=3)
    run(decoder, [turn])
    assert turn.cached_tokens == 80  # 89 keys were there: five full blocks
    fresh = Row(turn.prompt, max_tokens=3)
    run(Decoder(model, prefix_tokens=0), [fresh])
    assert turn.completion == fresh.completion


def test_a_small_prefix_store_makes_room_and_changes_nothing() -> None:
    model = tiny_llama()
    prompts = prompts_with_shared_beginnings(10) * 2
    rows = [Row(prompt, max_tokens=5) for prompt in prompts]
    run(Decoder(model, prefix_tokens=64, max_rows=3), rows)
    plain = [Row(prompt, max_tokens=5) for prompt in prompts]
    run(Decoder(model, prefix_tokens=0), plain)
    assert [row.completion for row in rows] == [row.completion for row in plain]


def test_rows_wait_when_the_cache_is_full() -> None:
    model = tiny_llama()
    decoder = Decoder(model, cache_tokens=256)
    rows = [Row([5 + n] * 50, max_tokens=10) for n in range(9)]
    assert decoder.room(rows) == 4
    run(decoder, rows)
    assert [row.completion for row in rows] == [greedy(model, row) for row in rows]
    giant = Row([7] * 400, max_tokens=2)
    assert decoder.room([giant]) == 1
    run(decoder, [giant])
    assert giant.finish_reason == "length"


def test_a_long_prompt_is_read_in_pieces() -> None:
    model = tiny_llama(context=1024)
    counts = count_tokens(model)
    prompt = [n * 7 % 390 + 3 for n in range(700)]
    row, query = Row(prompt, max_tokens=4), LabelQuery(prompt[::-1], ((5, 6), (7,)))
    decoder = Decoder(model, prefill_tokens=256)
    decoder.prefill([row, query])
    assert max(counts) <= 2 * 256
    expected = [sum(plain_logps(model, query.prompt, list(label))) for label in query.labels]
    assert query.logps == pytest.approx(expected, abs=1e-4)
    assert row.logps == pytest.approx(plain_logps(model, prompt, row.completion), abs=1e-4)


def test_a_stop_check_ends_a_row() -> None:
    model = tiny_llama()
    row = Row([5, 6, 7], max_tokens=20, stopped=lambda completion: len(completion) == 4)
    run(Decoder(model), [row])
    assert (len(row.completion), row.finish_reason) == (4, "stop")


def test_alone_is_equal_to_the_last_bit_in_any_order() -> None:
    model = tiny_llama()
    prompts = prompts_with_shared_beginnings(8)

    def logps(order: list[int]) -> dict[int, list[float]]:
        decoder = Decoder(model, alone=True)
        rows = {n: Row(prompts[n], max_tokens=9, temperature=1.0, seed=n) for n in order}
        run(decoder, list(rows.values()))
        return {n: row.logps for n, row in rows.items()}

    assert logps(list(range(8))) == logps([5, 2, 7, 0, 1, 6, 4, 3])


def test_new_weights_need_the_prefixes_cleared() -> None:
    model = tiny_llama()
    decoder = Decoder(model)
    prompt = [n + 3 for n in range(60)]
    run(decoder, [Row(prompt, max_tokens=3)])
    sharpen(model, std=0.2)
    decoder.prefixes.clear()
    row = Row(prompt, max_tokens=8)
    run(decoder, [row])
    assert row.completion == greedy(model, row)
