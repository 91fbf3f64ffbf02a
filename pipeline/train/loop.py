"""The one training loop: AdamW on batches as the user set them, evaluation, checkpoints, exact resume.

A step's loss is the sum of its terms (tokens, pairs or prompts, as the objective counts them) divided by their number
in the whole batch, however it is cut into microbatches. Dropout is off, and the order of rows is a function of seed and
epoch, so a checkpoint needs weights, optimiser state and step, and nothing else. Left out: several devices.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.config.settings import TrainSettings
from pipeline.errors import DivergedError, ResourceError, StoppedError
from pipeline.records import Line
from pipeline.store import io_errors
from pipeline.train import checkpoints
from pipeline.train.batches import Data, batch_at, microbatches, steps_per_epoch

KEPT = 2
"""Newest checkpoints that are kept, one in case the other is damaged."""
COSINE_END = 0.1


class Terms(NamedTuple):
    """losses: (items,) what is averaged into the loss. metrics: values whose mean over the whole batch is logged."""

    losses: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """What one trainer minimises."""

    def num_terms(self, data: Data, row: int) -> int:
        """How many terms of the loss a row has."""

    def __call__(self, model: Any, data: Data, rows: Sequence[int]) -> Terms:
        """The terms of these rows."""


class Outcome(NamedTuple):
    """step: whose weights the model has now: of the best evaluation, or the last. metrics: of that evaluation."""

    step: int
    metrics: dict[str, float]


class Progress(NamedTuple):
    """What a watcher is told after every step."""

    step: int
    total: int
    tokens: int
    line: Line


def fit(
    model: Any,
    objective: Objective,
    train: Data,
    test: Data,
    settings: TrainSettings,
    folder: Path,
    *,
    seed: int,
    select: str = "eval/loss",
    higher_is_better: bool = False,
    watch: Callable[[Progress], None] = lambda progress: None,
    warn: Callable[[str], None] = lambda message: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains the model in place, from the newest checkpoint in `folder/checkpoints` if there is one.

    model: in fp32, as `lm.forward.prepare` leaves it. test: may be empty; then the last weights are kept, else those of
    the best evaluation by the metric `select`. Writes `folder/metrics.jsonl`.
    Raises DivergedError (7) at the step whose loss or gradient is not finite, StoppedError (75) when asked to stop.
    """
    silence_dropout(model, settings)
    run = _Run(model, objective, train, test, settings, folder, seed, select, higher_is_better)
    run.resume(warn)
    while run.step < run.total and not run.has_stalled():
        began = time.perf_counter()
        line = run.train_step()
        if run.is_due(settings.eval_every):
            line |= run.evaluate()
        seconds = time.perf_counter() - began
        run.log(line | {"seconds": round(seconds, 3)})
        watch(Progress(run.step, run.total, run.num_tokens, line))
        stops = should_stop()
        if stops or run.is_due(settings.save_every):
            run.save()
        if stops and run.step < run.total:
            raise StoppedError(f"{folder}: stopped after step {run.step} of {run.total}; the same command goes on here")
    return run.finish()


class _Run:
    """The state of one training."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        train: Data,
        test: Data,
        settings: TrainSettings,
        folder: Path,
        seed: int,
        select: str,
        higher_is_better: bool,
    ) -> None:
        self.model, self.objective, self.train, self.test = model, objective, train, test
        self.settings, self.folder, self.seed = settings, folder, seed
        self.select, self.sign = select, -1 if higher_is_better else 1
        self.per_epoch = steps_per_epoch(len(train), settings.batch_size)
        self.total = self.per_epoch * settings.epochs
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters, settings.weight_decay)
        self.step = self.num_tokens = self.stale = 0
        self.best_step, self.best_metrics = 0, dict[str, float]()

    # One step

    def train_step(self) -> Line:
        """One update. Returns its line of metrics.jsonl."""
        rows = batch_at(self.step, num_rows=len(self.train), batch_size=self.settings.batch_size, seed=self.seed)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total, self.settings)
        self.optimizer.zero_grad(set_to_none=True)
        tally = _Tally()
        num_terms = sum(self.objective.num_terms(self.train, row) for row in rows)
        for part in microbatches(self.train, rows, max_tokens=self.settings.microbatch_tokens):
            with autocast(self.model, self.settings):
                terms = self.objective(self.model, self.train, part)
            (terms.losses.sum() / num_terms).backward()
            tally.add(terms)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        means = tally.means(norm)
        if not (math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"])):
            ids = ", ".join(self.train.ids[row] for row in rows[:5])
            raise DivergedError(
                f"{self.folder}: step {self.step + 1}: loss {means['loss']}, gradient norm {means['grad_norm']} "
                f"(rows {ids}, …); lower the learning rate, or look at these rows"
            )
        self.optimizer.step()
        self.step += 1
        self.num_tokens += sum(self.train.num_tokens(row) for row in rows)
        rate = self.optimizer.param_groups[0]["lr"]
        return {"step": self.step, "epoch": round(self.step / self.per_epoch, 4), "lr": rate, **means}

    def evaluate(self) -> Line:
        """Means over the test split; keeps the weights if they are the best so far."""
        if not len(self.test):
            return {}
        tally = _Tally()
        with torch.no_grad(), autocast(self.model, self.settings):
            for part in microbatches(self.test, range(len(self.test)), max_tokens=self.settings.microbatch_tokens):
                tally.add(self.objective(self.model, self.test, part))
        metrics = {f"eval/{name}": value for name, value in tally.means().items()}
        is_better = not self.best_metrics or (
            self.sign * metrics[self.select] < self.sign * self.best_metrics[self.select]
        )
        self.stale = 0 if is_better else self.stale + 1
        if is_better:
            self.best_step, self.best_metrics = self.step, metrics
            checkpoints.save(self.folder / "best", {"step": self.step}, {"weights": self.weights()})
        return metrics

    def has_stalled(self) -> bool:
        return self.settings.patience is not None and self.stale >= self.settings.patience

    def is_due(self, every: int | None) -> bool:
        """At the end of training, and every so many steps; once an epoch if not said."""
        return self.step == self.total or self.step % (every or self.per_epoch) == 0

    # Files

    def log(self, line: Line) -> None:
        path = self.folder / "metrics.jsonl"
        with io_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        names = ("step", "num_tokens", "stale", "best_step", "best_metrics")
        state = {name: getattr(self, name) for name in names}
        path = self.folder / "metrics.jsonl"
        state["metrics_bytes"] = path.stat().st_size if path.exists() else 0
        tensors = {"weights": self.weights(), "optimizer": self._optimizer_tensors()}
        checkpoints.save(self.folder / "checkpoints" / f"step-{self.step:08d}", state, tensors)
        checkpoints.prune(self.folder / "checkpoints", keep=KEPT)

    def resume(self, warn: Callable[[str], None]) -> None:
        """Takes everything from the newest checkpoint, and cuts off what was logged after it."""
        found = checkpoints.newest(self.folder / "checkpoints", warn)
        path, size = self.folder / "metrics.jsonl", 0
        if found:
            state, tensors = found
            size = state.pop("metrics_bytes")
            for name, value in state.items():
                setattr(self, name, value)
            self._load_weights(tensors("weights"))
            self._load_optimizer(tensors("optimizer"))
        if path.exists():
            with io_errors(path), path.open("r+b") as file:
                file.truncate(size)

    def finish(self) -> Outcome:
        """The best weights go back into the model; without evaluations the last ones stay."""
        if not self.best_metrics or self.best_step == self.step:
            return Outcome(self.step, self.best_metrics)
        best = checkpoints.load(self.folder / "best")
        if best is None or best[0]["step"] != self.best_step:
            raise ResourceError(f"{self.folder / 'best'}: is not whole any more; delete {self.folder} and train again")
        self._load_weights(best[1]("weights"))
        return Outcome(self.best_step, self.best_metrics)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{key}.{name}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            key, _, parameter = name.partition(".")
            state[parameter][key] = value
        for name, parameter in self.parameters.items():
            where = {key: value.to(parameter.device) for key, value in state[name].items()}
            self.optimizer.state[parameter] = where


class _Tally:
    """Sums and counts of what a batch's microbatches report, on the device until one transfer at the end."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, terms: Terms) -> None:
        self._parts["loss"].append(terms.losses.detach())
        for name, values in terms.metrics.items():
            self._parts[name].append(values.detach())

    def means(self, norm: Tensor | None = None) -> dict[str, float]:
        values = {name: torch.cat(parts).float().mean() for name, parts in self._parts.items()}
        if norm is not None:
            values["grad_norm"] = norm
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def make_optimizer(parameters: dict[str, Tensor], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); only matrices decay."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Of the step with this number, from 0: a linear warm-up, then constant, linear to 0 or a cosine to 10 %."""
    warmup = round(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        share = COSINE_END + (1 - COSINE_END) * (1 + math.cos(math.pi * progress)) / 2
    else:
        share = 1 - progress if settings.schedule == "linear" else 1.0
    return settings.learning_rate * share


def autocast(model: Any, settings: TrainSettings) -> Any:
    """bf16 arithmetic on fp32 weights; auto: on a GPU only."""
    kind = model.device.type
    if settings.precision == "bfloat16" or (settings.precision == "auto" and kind == "cuda"):
        return torch.autocast(kind, dtype=torch.bfloat16)
    return nullcontext()


def silence_dropout(model: Any, settings: TrainSettings) -> None:
    """Evaluation mode; transformers checkpoints in training mode only, so there every dropout is set to 0."""
    model.eval()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
        for module in _dropouts(model):
            module.p = 0.0


def _dropouts(model: Any) -> Iterator[torch.nn.Dropout]:
    return (module for module in model.modules() if isinstance(module, torch.nn.Dropout))
