"""The one training loop: AdamW on batches as the user set them, evaluation, checkpoints, exact resume.

A step's loss is the sum of its terms (tokens, pairs or prompts, as the objective counts them) divided by their number
in the whole batch, however it is cut into microbatches. Dropout is off, and the order of rows is a function of seed and
epoch, so a checkpoint needs weights, optimiser state and step, and what refreshes the data, if anything does.

Several processes deal a batch's rows among themselves and add up their gradients. All count, decide and stop alike; the
first one writes. None of this depends on their number, so that a checkpoint may be gone on from with another one.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.config.settings import TrainSettings
from pipeline.errors import DivergedError, ResourceError, StoppedError
from pipeline.records import Line
from pipeline.train import checkpoints, ranks, shards
from pipeline.train.batches import Data, batch_at, longest_microbatch, own_microbatches, steps_per_epoch
from pipeline.train.best import Best
from pipeline.train.lines import LineFile
from pipeline.train.optimizer import learning_rate, load_state, make_optimizer, state_tensors

NAMED = 5
"""Rows that a message names."""
LONG = 50
"""Steps from which on the longest rows are tried early; a shorter training comes to them soon by itself."""

T = TypeVar("T")


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


class Refresher(Protocol):
    """What changes the training data as training goes on, as a function of weights, seed and step."""

    def __call__(self, model: Any, step: int) -> None:
        """Before the step with this number, from 0."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint after this step holds of it."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Puts it back."""


@dataclass(frozen=True)
class Task:
    """What is trained, and where.

    model: in fp32, as `lm.forward.prepare` leaves it. test: may be empty; then the last weights are kept.
    folder: of the work in progress. measures: further metrics of an evaluation, each a function of the model.
    """

    model: Any
    objective: Objective
    train: Data
    test: Data
    settings: TrainSettings
    folder: Path
    seed: int
    measures: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)
    refresh: Refresher | None = None


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
    task: Task,
    *,
    watch: Callable[[Progress], None] = lambda progress: None,
    warn: Callable[[str], None] = lambda message: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains the model in place, from the newest checkpoint in `folder/checkpoints` if there is one.

    Writes `folder/metrics.jsonl`. The weights of the evaluation that `settings.select` finds best are the outcome.
    Raises DivergedError (7) at the step whose loss or gradient is not finite, StoppedError (75) when asked to stop.
    """
    silence_dropout(task.model, task.settings)
    run = _Run(task)
    run.resume(warn)
    run.check_select()
    first = run.step + 1
    while run.pending or (run.step < run.total and not run.has_stalled()):
        began = time.perf_counter()
        line, run.pending = run.pending or run.train_step(), None
        if run.step == first and run.total - first >= LONG:
            run.check_memory()
        saves = run.is_due(task.settings.save_every)
        if run.is_due(task.settings.eval_every):
            if saves:
                run.save(line)
            line |= run.evaluate()
        run.metrics.append([line | {"seconds": round(time.perf_counter() - began, 3)}])
        watch(Progress(run.step, run.total, run.num_tokens, line))
        stops, is_late = ranks.any_of(should_stop(), run.checkpoints.is_late and not task.settings.save_every)
        if stops or saves or is_late:
            run.save()
        if stops and run.step < run.total:
            at = f"{task.folder}: stopped after step {run.step} of {run.total}"
            raise ranks.shared(StoppedError(f"{at}; the same command goes on here"))
    return run.finish(warn)


class _Run:
    """The state of one training."""

    def __init__(self, task: Task) -> None:
        self.task, self.model, self.settings = task, task.model, task.settings
        self.per_epoch = steps_per_epoch(len(task.train), self.settings.batch_size)
        self.total = self.per_epoch * self.settings.epochs
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not shards.is_sharded(self.model):
            ranks.copy_from_first([parameter.detach() for parameter in self.parameters.values()])
        self.optimizer = make_optimizer(self.parameters, self.settings.weight_decay)
        self.best = Best(self.settings.select)
        self.metrics = LineFile(task.folder / "metrics.jsonl")
        self.checkpoints = checkpoints.Series(task.folder)
        self.step = self.num_tokens = 0
        self.pending: Line | None = None  # of a step whose evaluation did not come to its end

    # One step

    def train_step(self) -> Line:
        """One update. Returns its line of metrics.jsonl."""
        data, size = self.task.train, self.settings.batch_size
        rows = batch_at(self.step, num_rows=len(data), batch_size=size, seed=self.task.seed)
        if self.task.refresh:
            self.task.refresh(self.model, self.step)
        rate = learning_rate(self.step, self.total, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        means = self._backward(rows)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        means["grad_norm"] = shards.undivided(norm).item()
        self._check_finite({name: means[name] for name in ("loss", "grad_norm")}, rows, data)
        self.optimizer.step()
        self.step += 1
        self.num_tokens += sum(map(data.num_tokens, rows))
        return {"step": self.step, "epoch": round(self.step / self.per_epoch, 4), "lr": rate, **means}

    def _backward(self, rows: Sequence[int]) -> dict[str, float]:
        """Leaves the gradient of the batch in the parameters. Returns the means over it."""
        num_terms = sum(self.task.objective.num_terms(self.task.train, row) for row in rows)
        self.optimizer.zero_grad(set_to_none=True)
        tally = shards.by_itself(self.model, lambda: self._pass(self.task.train, rows, num_terms=num_terms))
        if not shards.is_sharded(self.model):  # FSDP has done it
            ranks.add_up([p.grad for p in self.parameters.values() if p.grad is not None])
        return tally.means()

    def check_memory(self) -> None:
        """The longest microbatch, forward and backward, when the optimiser's state is there: it fits now or never."""
        data, settings = self.task.train, self.settings
        longest = partial(longest_microbatch, max_tokens=settings.microbatch_tokens)
        found = longest(data, batch_size=settings.batch_size)
        shards.by_itself(self.model, lambda: self._forward(data, found, 0.0))
        if len(test := self.task.test):
            with torch.no_grad():
                found = longest(test, batch_size=len(test))
                shards.by_itself(self.model, lambda: self._forward(test, found, None))
        self.optimizer.zero_grad(set_to_none=True)

    def _pass(self, data: Data, rows: Sequence[int], *, num_terms: int | None = None) -> Tally:
        """This process's share of the rows through the model; backward, too, if the number of all terms is given."""
        tally = Tally()
        for part, counts in own_microbatches(data, rows, max_tokens=self.settings.microbatch_tokens):
            terms = self._forward(data, part, counts / num_terms if num_terms else None)
            if counts:
                tally.add(terms)
        return tally

    def _forward(self, data: Data, rows: Sequence[int], weight: float | None) -> Terms:
        """The rows' terms; adds to the gradient if given a weight, which is that of each."""
        with enough_memory(f"{self.task.folder}: step {self.step + 1}", data, rows):
            terms = self._terms(data, rows)
            if weight is not None:
                (terms.losses.sum() * weight).backward()
        return terms

    def _terms(self, data: Data, rows: Sequence[int]) -> Terms:
        with autocast(self.model, self.settings):
            return shards.compute(self.model, lambda: self.task.objective(self.model, data, rows))

    def _check_finite(self, found: dict[str, float], rows: Sequence[int], data: Data) -> None:
        if all(map(math.isfinite, found.values())):
            return
        values = ", ".join(f"{name} {value}" for name, value in found.items())
        at = f"{self.task.folder}: step {self.step + (data is self.task.train)}: {values} ({_names(data, rows)})"
        raise ranks.shared(DivergedError(f"{at}; lower the learning rate, or look at these rows"))

    def evaluate(self) -> Line:
        """Means over the test split, and the task's measures; keeps the weights if they are the best so far."""
        data, metrics = self.task.test, dict[str, float]()
        if len(data):
            with torch.no_grad():
                tally = shards.by_itself(self.model, lambda: self._pass(data, range(len(data))))
            metrics = {f"eval/{name}": value for name, value in tally.means().items()}
            self._check_finite({"eval/loss": metrics["eval/loss"]}, range(len(data)), data)
        metrics |= {name: measure(self.model) for name, measure in self.task.measures.items()}
        if metrics and self.best.take(self.step, metrics):
            checkpoints.write(self.task.folder / "best", {"step": self.step}, {"weights": self.parameters})
        return metrics

    @torch.no_grad()
    def check_select(self) -> None:
        """Raises UsageError now if the evaluations will not have the metric that decides, by a look at one row."""
        known = {"eval/loss", *self.task.measures}
        if len(self.task.test) and self.best.metric not in known:
            known |= {f"eval/{name}" for name in self._terms(self.task.test, [0]).metrics}
            ranks.together(lambda: self.best.check(known))

    def has_stalled(self) -> bool:
        return self.settings.patience is not None and self.best.stale >= self.settings.patience

    def is_due(self, every: int | None) -> bool:
        """At the end of training, and every so many steps; once an epoch if not said."""
        return self.step == self.total or self.step % (every or self.per_epoch) == 0

    # Files

    def save(self, line: Line | None = None) -> None:
        """line: of this step, if its evaluation is still to come."""
        state = {"step": self.step, "num_tokens": self.num_tokens, "best": self.best.state}
        state |= {"metrics_bytes": self.metrics.size(), "pending": json.dumps(line)}
        tensors = {"weights": self.parameters, "optimizer": state_tensors(self.optimizer, self.parameters)}
        if self.task.refresh:
            tensors["fresh"] = self.task.refresh.tensors()
        self.checkpoints.save(state, tensors)

    def resume(self, warn: Callable[[str], None]) -> None:
        """Takes everything from the newest checkpoint, and cuts off what was logged after it."""
        size = 0
        if found := self.checkpoints.resume(warn):
            state, tensors = found.state, found.tensors
            self.step, self.num_tokens, size = state["step"], state["num_tokens"], state["metrics_bytes"]
            self.best.state, self.pending = state["best"], json.loads(state["pending"])
            self._load_weights(tensors("weights"))
            load_state(self.optimizer, self.parameters, tensors("optimizer"))
            if self.task.refresh:
                self.task.refresh.load(tensors("fresh"))
        self.metrics.cut(size)

    def finish(self, warn: Callable[[str], None]) -> Outcome:
        """The best weights go back into the model; without evaluations, or if they are damaged, the last ones stay."""
        step = self.best.step
        if step in (0, self.step):
            return Outcome(self.step, self.best.metrics)
        places = dict.fromkeys((self.task.folder / "best", self.checkpoints.place(step)), "weights")
        weights = checkpoints.weights_of(step, places, warn)
        if weights is None:
            warn(f"the weights of step {self.step} are kept, and not those of step {step}")
            return Outcome(self.step, self.metrics.last_evaluation())
        self._load_weights(weights)
        return Outcome(step, self.best.metrics)

    @torch.no_grad()
    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(shards.like(tensors[name], parameter))


@contextmanager
def enough_memory(where: str, data: Data, rows: Sequence[int]) -> Iterator[None]:
    """Has ResourceError say what was computed when memory ran out."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        num_tokens = sum(map(data.num_tokens, rows))
        raise ResourceError(
            f"{where}: out of memory with {num_tokens} tokens ({_names(data, rows)}); "
            "lower microbatch_tokens or set gradient_checkpointing, and the same command goes on here; "
            "or lower max_length and begin again"
        ) from error


def _names(data: Data, rows: Sequence[int]) -> str:
    return "rows " + ", ".join(data.ids[row] for row in rows[:NAMED]) + (", …" if len(rows) > NAMED else "")


class Tally:
    """Values that microbatches report, kept on the device until their means are taken."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, terms: Terms) -> None:
        for name, values in {"loss": terms.losses, **terms.metrics}.items():
            self._parts[name].append(values.detach())

    def join(self, other: Tally) -> None:
        for name, parts in other._parts.items():
            self._parts[name] += parts

    def means(self) -> dict[str, float]:
        """Over all processes."""
        sums, counts = dict[str, float](), Counter[str]()
        for own in ranks.gather(self._sums()):
            for name, (total, count) in own.items():
                sums[name] = sums.get(name, 0.0) + total
                counts[name] += count
        return {name: total / counts[name] for name, total in sums.items()}

    def _sums(self) -> dict[str, tuple[float, int]]:
        if not self._parts:
            return {}
        values = {name: torch.cat(parts).float() for name, parts in self._parts.items()}
        sums = torch.stack([each.sum() for each in values.values()]).tolist()
        return {name: (total, len(values[name])) for name, total in zip(values, sums, strict=True)}


def autocast(model: Any, settings: TrainSettings) -> Any:
    """The arithmetic of the settings, on fp32 weights."""
    kind = model.device.type
    dtype = compute_dtype(settings, kind)
    return nullcontext() if dtype == torch.float32 else torch.autocast(kind, dtype=dtype)


def compute_dtype(settings: TrainSettings, kind: str) -> torch.dtype:
    """auto: bf16 on a GPU only. kind: of device."""
    is_half = settings.precision == "bfloat16" or (settings.precision == "auto" and kind == "cuda")
    return torch.bfloat16 if is_half else torch.float32


def silence_dropout(model: Any, settings: TrainSettings) -> None:
    """Evaluation mode; transformers checkpoints in training mode only, so there every dropout is set to 0."""
    model.eval()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):  # as attention layers have it
                    setattr(module, name, 0.0)
