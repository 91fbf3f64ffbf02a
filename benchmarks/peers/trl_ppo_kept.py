"""Keeps what TRL 1.12's PPO computes in one step, tensor by tensor, for a test of ours.

    python trl_ppo_kept.py JOB.json

Its quantities are local variables of `PPOTrainer.train`; they are read where that calls what is wrapped here: the
whitening, the backward pass of every minibatch, and the logger at the step's end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import set_seed
from trl.experimental.ppo import PPOTrainer, ppo_trainer
from trl_ppo import open_trainer

OF_STEP = (
    *("queries", "responses", "sequence_lengths", "padding_mask", "padding_mask_p1"),
    *("logprobs", "ref_logprobs", "values", "scores", "kl", "non_score_reward", "rewards", "advantages", "returns"),
    *("approxkl_stats", "pg_clipfrac_stats", "pg_loss_stats", "vf_loss_stats", "vf_clipfrac_stats"),
    *("entropy_stats", "ratio_stats"),
)
OF_MINIBATCH = ("new_logprobs", "vpred", "pg_loss_max", "vf_loss_max")
NOT_KEPT = ("eps",)
"""Episodes a second: another number in every run."""


class Kept(PPOTrainer):
    """kept: tensors by their names in TRL, `NUMBER/NAME` for those of a minibatch."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept: dict[str, Tensor] = {}
        self.metrics: dict[str, float] = {}
        self.num_minibatches = 0
        self._backward, self.accelerator.backward = self.accelerator.backward, self.backward

    def keep(self, name: str, value: Tensor) -> None:
        self.kept[name] = value.detach().clone().contiguous()

    def backward(self, loss: Tensor) -> None:
        found = sys._getframe(1).f_locals
        for name in OF_MINIBATCH:
            self.keep(f"{self.num_minibatches}/{name}", found[name])
        self.keep(f"{self.num_minibatches}/rows", torch.from_numpy(found["micro_batch_inds"]))
        logps = found["logits"].detach().double().log_softmax(-1)
        self.keep(f"{self.num_minibatches}/entropies", -(logps.exp() * logps).sum(-1).float())
        self.num_minibatches += 1
        self._backward(loss)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        found = sys._getframe(1).f_locals
        for name in OF_STEP:
            self.keep(name, found[name])
        self.metrics = {name: value for name, value in logs.items() if name not in NOT_KEPT}
        super().log(logs, *args, **options)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)  # the order of sums depends on their number
    set_seed(job["seed"])  # TRL leaves numpy's, which cuts the minibatches, to chance
    trainer: Any = open_trainer(job, Kept)
    whiten = ppo_trainer.masked_whiten

    def kept_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        trainer.keep(f"{'advantages' if shift_mean else 'rewards'}_before", values)
        return whiten(values, mask, shift_mean)

    ppo_trainer.masked_whiten = kept_whiten
    trainer.train()
    save_file(trainer.kept, job["save"])
    print(json.dumps(trainer.metrics))


if __name__ == "__main__":
    main()
