"""`--dry-run`: it refuses what the training would refuse, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from pipeline.config.settings import Settings
from pipeline.errors import UsageError
from pipeline.train import dpo, sft
from pipeline.train.memory import Memory
from pipeline.train.plan import Plan, plan
from pipeline.train.ppo import plan_ppo
from pipeline.train.rows import Source
from pipeline.train.stage import Job
from tests.pipeline.lm.tiny import CHATML, save_tiny, tiny_tokenizer
from tests.pipeline.train.ppo_jobs import ppo_settings, run_ppo, save_reward_model
from tests.pipeline.train.tiny_jobs import run_job


@pytest.fixture(scope="module")
def reward_model(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("rm"), start)


def job_of(data: Path, start: Path, out: Path, **options: Any) -> Job:
    return Job(sources=[Source(str(data))], start=str(start), out=out, device="cpu", **options)


def plan_sft(data: Path, start: Path, out: Path, *, scorer: Path | None = None, **keys: Any) -> Plan:
    settings = Settings.model_validate({"train_sft": keys}).train_sft
    names = [f"eval/{name}" for name in ("loss", *sft.METRICS)]
    job = job_of(data, start, out)
    return plan(job, settings, "sft", "language", metrics=names, scorer=scorer and str(scorer))


def test_a_metric_that_no_evaluation_has_is_refused_as_the_training_refuses_it(
    start: Path, data: Path, reward_model: Path, tmp_path: Path
) -> None:
    keys = {"select": "max eval/rewards/accuracy"}
    settings = Settings.model_validate({"train_dpo": keys}).train_dpo
    names = [f"eval/{name}" for name in ("loss", *dpo.METRICS)]
    assert plan(job_of(data, start, tmp_path / "out"), settings, "pairs", "language", metrics=names).steps == 1
    refused = r"select: an evaluation has no eval/rewards/accuracy; take one of eval/"
    with pytest.raises(UsageError, match=refused):
        plan_sft(data, start, tmp_path / "out", **keys)
    with pytest.raises(UsageError, match=refused):
        run_job("sft", data, start, tmp_path / "out", keys=keys)
    ppo = job_of(data, start, tmp_path / "ppo")
    assert plan_ppo(ppo, ppo_settings(select="min eval/kl"), reward_model=str(reward_model)).steps == 3
    with pytest.raises(UsageError, match=refused):
        plan_ppo(ppo, ppo_settings(**keys), reward_model=str(reward_model))
    with pytest.raises(UsageError, match=refused):
        run_ppo(data, start, reward_model, tmp_path / "ppo", keys=keys)


def test_a_reward_model_that_cannot_score_here_is_refused(
    start: Path, data: Path, reward_model: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other")
    save_reward_model(tmp_path / "other-rm", other)
    tiny_tokenizer(template=CHATML.replace("user", "human") + " ").save_pretrained(tmp_path / "other-rm")
    ppo = job_of(data, start, tmp_path / "ppo")
    for model, message in (
        (tmp_path / "nowhere", "no such folder; check its name"),
        (start, "no reward model but a language model"),
        (tmp_path / "other-rm", r"another tokenizer or chat template|is not the policy's"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_sft(data, start, tmp_path / "out", scorer=model)
        with pytest.raises(UsageError, match=message):
            plan_ppo(ppo, ppo_settings(), reward_model=str(model))
    assert plan_ppo(ppo, ppo_settings(reencode=True), reward_model=str(tmp_path / "other-rm")).steps == 3
    with pytest.raises(UsageError, match="no model that scores"):
        plan_ppo(ppo, ppo_settings())


def test_a_reward_model_beside_the_trained_one_is_counted(
    start: Path, data: Path, reward_model: Path, tmp_path: Path
) -> None:
    alone, both = (plan_sft(data, start, tmp_path / "out", scorer=scorer).memory for scorer in (None, reward_model))
    numbers = AutoModelForSequenceClassification.from_pretrained(reward_model).num_parameters()
    assert both.weights - alone.weights == 4 * numbers
    assert both._replace(weights=0, free=0) == alone._replace(weights=0, free=0)


def test_a_model_that_is_divided_needs_a_share_of_each_process(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plan_sft(data, start, tmp_path / "out").memory
    monkeypatch.setattr("pipeline.train.ranks.size", lambda: 4)
    copied = plan_sft(data, start, tmp_path / "out", parallel="ddp").memory
    divided = plan_sft(data, start, tmp_path / "out", parallel="fsdp").memory
    assert copied._replace(free=0) == whole._replace(free=0)
    assert divided[:3] == tuple(part // 4 for part in whole[:3])
    assert divided.activations == whole.activations
    with pytest.raises(UsageError, match="fsdp cannot divide weights of 4 bits"):
        plan_sft(data, start, tmp_path / "out", parallel="fsdp", lora={"quantize": "4bit"})


def test_ppo_divides_all_models_but_the_one_that_scores(
    data: Path, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = save_tiny(tmp_path / "start", hidden=192)

    def plan_of(**keys: Any) -> Memory:
        settings = ppo_settings(parallel="fsdp", max_tokens=1, microbatch_tokens=1, **keys)
        return plan_ppo(job_of(data, start, tmp_path / "out"), settings, reward_model=str(reward_model)).memory

    whole = plan_of()
    monkeypatch.setattr("pipeline.train.ranks.size", lambda: 4)
    divided = plan_of()
    model = whole.weights // 4  # policy, value model, reference and reward model
    assert divided[:3] == (3 * model // 4 + model, whole.gradients // 4, whole.optimizer // 4)
    assert whole.activations < model == divided.activations  # which then are the weights of a policy that decodes
    with pytest.raises(UsageError, match="fsdp cannot divide weights of 4 bits"):
        plan_of(lora={"quantize": "4bit"})


def test_as_many_answers_are_scored_as_was_said(start: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "counts.py"
    file.write_text(
        "def score(conversations, completions):\n"
        f"    print(len(completions), file=open({str(tmp_path / 'scored')!r}, 'a'))\n"
        "    return [0.0] * len(completions)\n"
    )
    keys = {"reward": f"{file}:score", "num_samples": 3, "epochs": 2, "eval_every": 2}
    plan = plan_ppo(job_of(data, start, tmp_path / "ppo"), ppo_settings(**keys))
    run_ppo(data, start, None, tmp_path / "ppo", keys=keys)
    assert sum(map(int, (tmp_path / "scored").read_text().split())) == plan.answers
