"""One PPO training by TRL 1.12, the last version that has it, on prompts that are tokens already.

    python trl_ppo.py JOB.json

Runs in an environment of its own: see trl_ppo.txt beside this file. fp32, one minibatch a step, no gradient
accumulation, the whole batch in one pass where TRL lets one choose, no samples printed, nothing saved. The arm
`no-gc` takes the garbage collections and cache clearings out of its loop.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peak import peak_kib
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Ends(TrainerCallback):
    """When each step ended: seconds, and seconds of all processors together."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


class NoCollector:
    """Stands for the module `gc` in TRL's."""

    @staticmethod
    def collect() -> int:
        return 0


def config(job: dict[str, Any], num_prompts: int) -> PPOConfig:
    """job: options: more arguments of TRL's own configuration."""
    return PPOConfig(
        output_dir=str(Path(job["model"]) / "output"),
        total_episodes=num_prompts,
        per_device_train_batch_size=job["batch_size"],
        gradient_accumulation_steps=1,
        num_ppo_epochs=job["num_inner_epochs"],
        local_rollout_forward_batch_size=job["batch_size"],
        response_length=job["max_tokens"],
        stop_token="eos",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        num_sample_generations=0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=job["seed"],
        **{"num_mini_batches": 1, "temperature": 1.0, "missing_eos_penalty": None, **job.get("options", {})},
    )


def open_trainer(job: dict[str, Any], kind: type[PPOTrainer] = PPOTrainer, **options: Any) -> PPOTrainer:
    """job: reference, value_model: if they do not begin as the policy and the reward model. options: of the trainer."""
    prompts = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    dataset = Dataset.from_list([{"input_ids": prompt} for prompt in prompts])

    def load(auto: Any, folder: str, **more: Any) -> Any:
        return auto.from_pretrained(folder, dtype=torch.float32, **more)

    return kind(
        args=config(job, len(prompts)),
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
        model=load(AutoModelForCausalLM, job["model"]),
        ref_model=load(AutoModelForCausalLM, job.get("reference", job["model"])),
        reward_model=load(AutoModelForSequenceClassification, job["reward_model"], num_labels=1),
        value_model=load(AutoModelForSequenceClassification, job.get("value_model", job["reward_model"]), num_labels=1),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)),
        **options,
    )


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["arm"] == "no-gc":
        ppo_trainer.gc, ppo_trainer.empty_cache = NoCollector, lambda: None
    ends = Ends()
    open_trainer(job, callbacks=[ends]).train()
    (began, cpu), (ended, cpu_end) = ends.times[0], ends.times[-1]
    print(json.dumps({
        "seconds": ended - began,
        "cpu": cpu_end - cpu,
        "peak": peak_kib(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
