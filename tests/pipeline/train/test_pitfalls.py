"""Known ways to train a language model wrongly, each as a test that fails if we do.

Elsewhere: prompt and completion that merge at the border, a beginning token twice, truncation that eats the completion
(test_batches); padding that is the end of a turn hides it from a reward model, a big batch in pieces, a loss that is
not finite, DPO at ln 2, RRHF with one completion (test_stages); soft labels, the sign of DPO, RRHF's weight
(test_losses); a reward model with an element for each pair of a prompt (test_comparisons); samples after the weights
changed (test_resample); the prompt shared by completions (lm/test_forward).
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from pipeline.config.settings import TrainDpoSettings, TrainSettings
from pipeline.errors import DivergedError
from pipeline.lm.forward import Group, completion_ends, completion_logps, prepare
from pipeline.lm.head import token_logps
from pipeline.lm.packed import PACKED
from pipeline.lm.templates import Chat
from pipeline.records import Message
from pipeline.train.batches import Data, tokenise
from pipeline.train.dpo import Preference
from pipeline.train.loop import autocast, silence_dropout
from pipeline.train.rm import Comparisons
from pipeline.train.rows import Row
from pipeline.train.rrhf import Ranking
from pipeline.train.sft import Imitation
from tests.pipeline.lm.tiny import save_tiny, sharpen, tiny_llama, tiny_tokenizer
from tests.pipeline.train.tiny_jobs import WORDS, metrics, run_job, write_rows

DATA = Path(__file__).parents[4] / "shared" / "data"
END = 2  # <|im_end|>


def rows_of(num: int, num_completions: int = 3) -> list[Row]:
    """Prompts and completions of 1 to 30 words, the best first."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))

    scores = tuple(float(-n) for n in range(num_completions))
    return [
        Row(f"r{n}", [Message(role="user", content=text())], tuple(text() for _ in scores), 0.8, scores, "ai")
        for n in range(num)
    ]


def data_of(rows: Sequence[Row], tokenizer: Any = None) -> Data:
    return tokenise(rows, Chat(tokenizer or tiny_tokenizer()), max_length=512, too_long="drop")


def llama(*, packed: bool = True) -> Any:
    model = tiny_llama()
    if packed:
        prepare(model)
        assert model.config._attn_implementation == PACKED
    return model


def reward_llama(*, packed: bool = True) -> Any:
    """With a score head that is not zero."""
    torch.manual_seed(0)
    model = sharpen(t.LlamaForSequenceClassification(copy.deepcopy(tiny_llama().config)))
    if packed:
        prepare(model)
        assert model.config._attn_implementation == PACKED
    return model


def left_padded(model: Any, groups: Sequence[Group], *, more: int = 0) -> Tensor:
    """(N,) log-probabilities of completions in one batch padded on the left, position ids from the mask."""
    rows = [torch.cat([g.prompt, c]).long() for g in groups for c in g.completions]
    lengths = [len(c) for g in groups for c in g.completions]
    width = max(map(len, rows)) + more
    tokens, mask = torch.full((len(rows), width), END), torch.zeros(len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        tokens[n, width - len(row) :], mask[n, width - len(row) :] = row, 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    logps = logits[:, :-1].float().log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
    return torch.stack([logps[n, -length:].sum() for n, length in enumerate(lengths)])


# Tokens and padding


def test_the_first_token_of_an_answer_is_trained_on() -> None:
    """A mask that is shifted by one leaves it out: the head then never learns how an answer begins."""
    model, data = llama(), data_of(rows_of(1))
    terms = Imitation()(model, data, [0])
    group = data.group(0)
    logits = model(input_ids=group.prompt[None].long()).logits[0, -1]
    assert math.isclose(
        terms.losses[0].item(), -logits.log_softmax(dim=-1)[group.completions[0][0]].item(), abs_tol=1e-5
    )


@pytest.mark.parametrize("packed", [True, False])
def test_padding_that_is_the_end_of_a_turn_does_not_hide_it_from_the_loss(packed: bool) -> None:
    """Where labels are masked by `token == pad`, a model whose padding is its end never learns to stop."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model, data = (
        llama(packed=packed),
        data_of([row._replace(completions=row.completions[:1]) for row in rows_of(3)], tokenizer),
    )
    terms = Imitation()(model, data, [0, 1, 2])
    ends = torch.tensor([len(data.group(row).completions[0]) for row in range(3)]).cumsum(dim=0) - 1
    for row, end in enumerate(ends.tolist()):
        (completion,) = data.group(row).completions
        assert completion[-1] == END
        whole = torch.cat([data.group(row).prompt, completion]).long()
        logps = model(input_ids=whole[None]).logits[0, -2].log_softmax(dim=-1)
        assert math.isclose(terms.losses[end].item(), -logps[END].item(), abs_tol=1e-4)
    assert len(terms.losses) == sum(data.num_completion_tokens(row) for row in range(3))


@pytest.mark.parametrize("packed", [True, False])
def test_a_log_probability_depends_on_no_padding_width_company_or_packing(packed: bool) -> None:
    model, groups = llama(packed=packed), [data_of(rows_of(6)).group(row) for row in range(6)]
    together = completion_logps(model, groups).sums
    alone = torch.cat([completion_logps(model, [group]).sums for group in groups])
    one_by_one = torch.cat(
        [completion_logps(model, [Group(g.prompt, (c,))]).sums for g in groups for c in g.completions]
    )
    plain = llama(packed=False)
    for other in (alone, one_by_one, left_padded(plain, groups), left_padded(plain, groups, more=37)):
        assert (together - other).abs().max() <= 1e-5 * together.abs().max()


def test_left_padding_needs_position_ids_and_has_them_while_decoding() -> None:
    """Without them a short prompt is read as if it began late: the trap is real, and decoding does not fall into it."""
    from pipeline.train.sampling import Sampler

    config = t.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=END)
    torch.manual_seed(0)
    model = sharpen(t.GPT2LMHeadModel(config))
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3] * 4]
    late = model(input_ids=torch.tensor([prompts[0]]), position_ids=torch.arange(25, 28)[None]).logits[0, -1]
    right = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
    assert late.argmax() != right.argmax()
    draw = Sampler(frozenset(), 6, 128, 0.0, TrainSettings())
    assert draw(model, prompts, [0, 0]) == [draw(model, [prompt], [0])[0] for prompt in prompts]
    assert draw(model, prompts, [0, 0])[0].tokens[0] == right.argmax()


@pytest.mark.parametrize("packed", [True, False])
def test_a_reward_is_read_at_the_last_token_that_is_no_padding(packed: bool) -> None:
    model, groups = llama(packed=packed), [data_of(rows_of(4)).group(row) for row in range(4)]
    together = completion_ends(model, groups)
    rows = [torch.cat([g.prompt, c]).long() for g in groups for c in g.completions]
    expected = torch.cat([model.base_model(input_ids=row[None]).last_hidden_state[:, -1] for row in rows])
    assert torch.allclose(together, expected, atol=1e-5)


def test_rrhf_divides_by_the_tokens_of_a_completion_and_not_by_a_padded_width() -> None:
    """The published code changes its labels in place, so that its lengths are those of the padded batch."""
    data = data_of(rows_of(4))
    padded = Ranking(1.0)(llama(packed=False), data, range(4)).losses
    alone = torch.cat([Ranking(1.0)(llama(packed=False), data, [row]).losses for row in range(4)])
    assert torch.allclose(padded, alone, rtol=1e-5)


# Arithmetic


def test_log_softmax_is_in_fp32_under_bf16_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 64, generator=generator), torch.randn(3000, 64, generator=generator)
    targets = torch.randint(0, 3000, (50,), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_logps(hidden, weight, targets)
        logits = hidden @ weight.T
    assert logits.dtype == torch.bfloat16
    exact = logits.double().log_softmax(dim=-1)[torch.arange(50), targets]
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    rounded = logits.log_softmax(dim=-1)[torch.arange(50), targets]  # what bf16 would have made of it
    assert (rounded - exact).abs().max() > 1e-2


def test_sums_of_log_probabilities_are_in_fp32_under_bf16_autocast() -> None:
    model = llama()
    group = Group(torch.arange(3, 20), (torch.arange(20, 320), torch.arange(100, 110)))
    with autocast(model, TrainSettings(precision="bfloat16")):
        logps = completion_logps(model, [group])
        sums, means = logps.sums, logps.means
    assert (logps.tokens.dtype, sums.dtype, means.dtype) == (torch.float32,) * 3
    exact = torch.stack([part.double().sum() for part in logps.tokens.split([300, 10])])
    assert (sums - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_weights_and_optimiser_stay_in_fp32_under_bf16_autocast(tmp_path: Path) -> None:
    """Steps of 1e-6 would be lost in bf16 weights, whose spacing around 0.1 is 5e-4."""
    start, data = save_tiny(tmp_path / "start"), write_rows(tmp_path / "rows.jsonl")
    keys = {"precision": "bfloat16", "learning_rate": 1e-6, "schedule": "constant", "warmup": 0.0}
    run_job("sft", data, start, tmp_path / "sft", keys=keys)
    before, after = (t.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (start, tmp_path / "sft"))
    layers = [name for name in before if ".layers." in name]
    assert min((before[name] != after[name]).float().mean().item() for name in layers) > 0.9


# Dropout


def with_dropout(name: str) -> Any:
    torch.manual_seed(0)
    if name == "gpt2":
        config = t.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=END)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
        return sharpen(t.GPT2LMHeadModel(config))
    model = tiny_llama()
    config = copy.deepcopy(model.config)
    config.attention_dropout = 0.5
    noisy = t.LlamaForCausalLM(config)
    noisy.load_state_dict(model.state_dict())
    return noisy


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_dropout_is_left_in_training(name: str, packed: bool, checkpointing: bool) -> None:
    """Policy and reference would differ at step 0, and PPO's ratio would not be 1."""
    model, groups = with_dropout(name), [data_of(rows_of(3)).group(row) for row in range(3)]
    model.eval()
    expected = completion_logps(model, groups).tokens
    model.train()
    if packed:
        prepare(model.eval())
    silence_dropout(model, TrainSettings(gradient_checkpointing=checkpointing))
    for _ in range(2):
        found = completion_logps(model, groups).tokens
        assert (found - expected).abs().max() <= 1e-4
    assert model.training == checkpointing


# Metrics


def test_a_dpo_pair_is_right_when_the_answer_that_its_label_prefers_has_the_larger_reward() -> None:
    """A soft label below one half says that the second answer is the better one."""
    labels, gains = (0.8, 0.2, 0.8, 0.2), torch.tensor([1.0, 1.0, -1.0, -1.0])
    rows = [row._replace(probability=label) for row, label in zip(rows_of(4, 2), labels, strict=True)]
    model, data = llama(), data_of(rows)
    references = completion_logps(model, [data.group(row) for row in range(4)]).sums.detach()
    references[0::2] -= gains
    metrics = Preference(TrainDpoSettings(), {id(data): references})(model, data, range(4)).metrics
    assert torch.allclose(metrics["rewards/margin"], 0.1 * gains, atol=1e-4)
    assert metrics["rewards/accuracy"].tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("trainer", ["sft", "rrhf", "dpo", "rm"])
def test_metrics_do_not_count_padding(trainer: str) -> None:
    """The same numbers from rows that are padded to a common width and from rows that never are."""
    rows = (
        rows_of(5)
        if trainer in ("sft", "rrhf")
        else [row._replace(completions=row.completions[:2], scores=()) for row in rows_of(5)]
    )
    rows = [row._replace(completions=row.completions[:1], scores=()) for row in rows] if trainer == "sft" else rows
    data = data_of(rows)
    references = {id(data): -torch.arange(10.0) * 7}
    make: dict[str, Any] = {
        "sft": Imitation,
        "rrhf": lambda: Ranking(1.0),
        "dpo": lambda: Preference(TrainDpoSettings(), references),
        "rm": lambda: Comparisons(0.01),
    }
    objective, model = make[trainer](), reward_llama if trainer == "rm" else llama
    padded, packed = (objective(model(packed=one), data, range(5)) for one in (False, True))
    assert padded.losses.mean().item() == pytest.approx(packed.losses.mean().item(), rel=1e-5)
    assert padded.metrics.keys() == packed.metrics.keys() == set(sys.modules[type(objective).__module__].METRICS)
    for name, values in packed.metrics.items():
        assert padded.metrics[name].float().mean().item() == pytest.approx(values.float().mean().item(), rel=1e-4), name


def test_an_evaluation_that_is_not_finite_stops_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the best so far it would never be beaten, and the bar shows only training losses."""
    start, data = save_tiny(tmp_path / "start"), write_rows(tmp_path / "rows.jsonl")
    usual = Imitation.__call__

    def poisoned(self: Imitation, model: Any, data: Data, rows: Sequence[int]) -> Any:
        terms = usual(self, model, data, rows)
        return terms if torch.is_grad_enabled() else terms._replace(losses=terms.losses * float("nan"))

    monkeypatch.setattr(Imitation, "__call__", poisoned)
    with pytest.raises(DivergedError, match="eval/loss nan"):
        run_job("sft", data, start, tmp_path / "sft")


# A reward model learns what there is to learn


def write_pairs(path: Path, num: int) -> Path:
    """hh-rlhf's shortest pairs where they lie beside the checkout, else pairs made here."""
    source = DATA / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if source.exists():
        with gzip.open(source, "rt", encoding="utf-8") as file:
            found = [json.loads(line) for line in file]
        talk = [line for line in found if len(line["chosen"].split()) > 20 and line["chosen"] != line["rejected"]]
        pairs = sorted(talk, key=lambda line: len(line["chosen"]) + len(line["rejected"]))[: num + 6]
    else:
        warnings.warn(f"{source} is not there; pairs made here were trained on instead", stacklevel=1)
        draw, start = random.Random(0), "\n\nHuman: {}\n\nAssistant: {}"
        texts = [[" ".join(draw.choices(WORDS, k=12)) for _ in range(3)] for _ in range(num + 6)]
        pairs = [{"chosen": start.format(p, c), "rejected": start.format(p, r)} for p, c, r in texts]
    lines = [{**pair, "id": n, "split": "train" if n < num else "test"} for n, pair in enumerate(pairs)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_reward_model_overfits_64_pairs_from_ln_2_to_all_right(tmp_path: Path) -> None:
    start, data = save_tiny(tmp_path / "start", hidden=64), write_pairs(tmp_path / "pairs.jsonl", 64)
    keys = {"epochs": 25, "batch_size": 32, "learning_rate": 3e-3, "center_coef": 0.0, "eval_every": 1000}
    report = run_job("rm", data, start, tmp_path / "rm", keys=keys)
    assert report.counts["train"]["rows"] == 64
    lines = metrics(tmp_path / "rm")
    assert math.isclose(lines[0]["loss"], math.log(2), abs_tol=1e-6)
    assert [line["scores/accuracy"] for line in lines[-2:]] == [1.0, 1.0]  # the two batches of the last epoch
