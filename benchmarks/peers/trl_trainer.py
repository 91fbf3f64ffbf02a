"""One training by TRL, on rows that are tokens already: how long an epoch took, its losses, its memory.

    python trl_trainer.py JOB.json

Runs in an environment of its own: see trl.txt beside this file. Tuned: fp32 weights, no gradient checkpointing, fused
AdamW, no saving, no padding to a multiple. Rows are taken in the file's order.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peak import peak_kib
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

PACKED_LENGTH = 1024
CONFIGS = {"sft": SFTConfig, "rm": RewardConfig, "dpo": DPOConfig}


class Spent(NamedTuple):
    """Seconds, and seconds of all processors together."""

    seconds: float
    cpu: float

    @classmethod
    def so_far(cls) -> Spent:
        return cls(time.perf_counter(), time.process_time())

    def since(self, began: Spent) -> Spent:
        return Spent(self.seconds - began.seconds, self.cpu - began.cpu)


class Recorded:
    """Keeps the loss of every microbatch."""

    def training_step(self, *args: Any, **options: Any) -> Any:
        loss = super().training_step(*args, **options)  # type: ignore[misc]
        self.__dict__.setdefault("recorded", []).append(loss.detach())
        return loss


class Sft(Recorded, SFTTrainer):
    """Rows: input_ids, labels."""


class Reward(Recorded, RewardTrainer):
    """Rows: chosen_ids, rejected_ids, each with its prompt."""


class Dpo(Recorded, DPOTrainer):
    """Rows: prompt_ids, chosen_ids, rejected_ids; as they are, since TRL would tokenise them."""

    reference = Spent(0.0, 0.0)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any) -> Any:
        began = Spent.so_far()
        found = super()._precompute_ref_logps(*args)
        self.reference = Spent.so_far().since(began)
        return found


TRAINERS = {"sft": Sft, "rm": Reward, "dpo": Dpo}


def columns(trainer: str, row: dict[str, list[int]]) -> dict[str, list[int]]:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if trainer == "sft":
        return {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}
    if trainer == "rm":
        return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def config(job: dict[str, Any], folder: Path) -> Any:
    """job: trainer, batch_size, learning_rate, precision; options: more arguments of TRL's own configuration."""
    own: dict[str, Any] = {"max_length": None}
    if job["arm"] == "packed":
        own = {"max_length": PACKED_LENGTH, "packing": True}
    elif job["arm"] == "precomputed":
        own |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": job["batch_size"]}
    return CONFIGS[job["trainer"]](
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": job["batch_size"],
            "learning_rate": job["learning_rate"],
            "lr_scheduler_type": "constant",
            "num_train_epochs": 1,
            "train_sampling_strategy": "sequential",
            "optim": "adamw_torch_fused",
            "bf16": job["precision"] == "bfloat16",
            "gradient_checkpointing": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **own,
            **job.get("options", {}),
        },
    )


def load(folder: str, trainer: str) -> Any:
    """A language model gets a head of zeros for the reward model, as ours does."""
    if trainer != "rm":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)
    if not any("SequenceClassification" in name for name in model.config.architectures):
        torch.nn.init.zeros_(model.score.weight)
    return model


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    model = load(job["model"], job["trainer"])
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()} if "save" in job else {}
    trainer = TRAINERS[job["trainer"]](
        model=model,
        args=config(job, Path(job["model"]) / "output"),
        train_dataset=Dataset.from_list([columns(job["trainer"], row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    began = Spent.so_far()
    trainer.train()
    spent, reference = Spent.so_far().since(began), getattr(trainer, "reference", Spent(0.0, 0.0))
    if "save" in job:
        save_file({name: p.detach() - start[name] for name, p in model.named_parameters()}, job["save"])
    steps = torch.stack(trainer.recorded).view(trainer.state.global_step, -1).sum(dim=1)
    print(json.dumps({
        "seconds": spent.seconds + reference.seconds,
        "cpu": spent.cpu + reference.cpu,
        "peak": peak_kib(),
        "losses": steps.tolist(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
