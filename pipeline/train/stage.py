"""What the trainers share around the loop: rows in, a model folder out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pipeline.config.settings import SplitSettings, TrainSettings
from pipeline.errors import IncompleteError, StoppedError, UsageError
from pipeline.lm.forward import prepare
from pipeline.lm.load import Head, Loaded, check_tokenizer, context_of, load, pick_device
from pipeline.lm.templates import Chat
from pipeline.train import ranks, rows
from pipeline.train.batches import Data, tokenise
from pipeline.train.layouts import Kind
from pipeline.train.loop import Objective, Outcome, Progress, Refresher, Task, compute_dtype, fit, silence_dropout
from pipeline.train.lora import attach
from pipeline.train.output import check_out, identity_of, publish, published, work_folder
from pipeline.train.shards import fill, shard, skeleton
from pipeline.train.trackers import check_installed, following


def _ignore(_: Any) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Job:
    """What to train. start: a model folder or hub name. out: the folder to be made. shares: of `export.split`.

    made_from: name -> digest of what the data was made from, for the card. trackers: as `run.trackers` names them.
    """

    sources: Sequence[rows.Source]
    start: str
    out: Path
    shares: SplitSettings = field(default_factory=SplitSettings)
    seed: int = 0
    device: str = "auto"
    made_from: dict[str, str] = field(default_factory=dict)
    trackers: Sequence[str] = ()
    watch: Callable[[Progress], None] = _ignore
    say: Callable[[str], None] = _ignore
    should_stop: Callable[[], bool] = lambda: False


class Opened(NamedTuple):
    """What an objective is made of. fingerprint: identity of the model that training starts from."""

    model: Any
    train: Data
    test: Data
    fingerprint: dict[str, str]
    chat: Chat


class Extras(NamedTuple):
    """What a trainer adds to the loop: metrics of an evaluation, and what refreshes the training data."""

    measures: Mapping[str, Callable[[Any], float]] = MappingProxyType({})
    refresh: Refresher | None = None


class Report(NamedTuple):
    """What came out. is_new: False if the folder had been made from the same inputs before."""

    folder: Path
    outcome: Outcome
    counts: dict[str, Any]
    is_new: bool


def train(
    job: Job,
    settings: TrainSettings,
    *,
    trainer: str,
    kind: Kind,
    make_objective: Callable[[Opened], Objective],
    head: Head = "language",
    make_extras: Callable[[Opened], Extras] = lambda opened: Extras(),
    other_models: Mapping[str, dict[str, str]] = MappingProxyType({}),
) -> Report:
    """Reads, tokenises, trains and publishes. trainer: its name, for card and identity.

    other_models: fingerprints of models that take part, by what they do.
    """
    check_installed(job.trackers)
    ranks.first(lambda: check_out(job.out, job.start, trainer=trainer))
    divides = ranks.together(lambda: check_divides(settings))
    loaded = ranks.together(lambda: load_start(job, settings, head, divides=divides))
    model = loaded.model
    check_tokenizer(loaded.tokenizer, model.get_input_embeddings().num_embeddings, job.start)
    chat = Chat(loaded.tokenizer)
    data, tallies = ranks.together(lambda: read_data(job, settings, kind, chat, context_of(model.config)))
    counts, digests = counts_of(data), {name: each.digest for name, each in data.items()}
    made_with = [job.seed, loaded.fingerprint, *other_models.items(), *digests.values()]
    identity = identity_of(trainer, settings, made_with)
    if found := ranks.first(lambda: published(job.out, identity)):
        return Report(job.out, Outcome(found["step"], found["metrics"]), counts, is_new=False)
    folder = ranks.first(lambda: work_folder(job.out, identity, job.say))
    prepare(model)
    adapted = attach(model, settings.lora, head=head, seed=job.seed) if settings.lora else None
    silence_dropout(model, settings)
    if head == "score":
        _keep_pad_apart(model, loaded.tokenizer)
    trained = model
    if divides:
        model = skeleton(model)
        device = pick_device(job.device)
        shard(trained, device, compute_dtype(settings, device.type))
    opened = Opened(trained, data["train"], data["test"], loaded.fingerprint, chat)
    extras, objective = make_extras(opened), make_objective(opened)
    task = Task(trained, objective, data["train"], data["test"], settings, folder, job.seed, *extras)
    with followed(job, settings, folder, identity) as watch:
        outcome = fit(task, watch=watch, warn=job.say, should_stop=job.should_stop)
    description = describe(
        job,
        settings,
        outcome,
        trainer=trainer,
        identity=identity,
        start=loaded.fingerprint,
        data={name: {"sha256": sha256, **counts[name]} for name, sha256 in digests.items()},
        tallies=tallies,
        models={name: found["weights"] for name, found in other_models.items()},
    )
    if divides:
        fill(model, trained)
    ranks.first(lambda: publish(model, adapted, loaded.tokenizer, job, folder, description))
    return Report(job.out, outcome, counts, is_new=True)


def describe(
    job: Job,
    settings: TrainSettings,
    outcome: Outcome,
    *,
    trainer: str,
    identity: str,
    start: dict[str, str],
    data: dict[str, dict[str, Any]],
    tallies: Sequence[rows.Tally],
    models: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What `training.json` and the card say. start: fingerprint. data: of each part. models: that took part."""
    return {
        "trainer": trainer,
        "identity": identity,
        "start": {"name": job.start, **start},
        "data": data,
        "sources": [str(tally) for tally in tallies],
        "made_from": {**job.made_from, **models},
        "settings": settings.model_dump(mode="json"),
        "seed": job.seed,
        "step": outcome.step,
        "metrics": outcome.metrics,
    }


@contextmanager
def followed(job: Job, settings: TrainSettings, folder: Path, identity: str) -> Iterator[Callable[[Progress], None]]:
    """What is to be told of every step: it tells the job's trackers and its watcher."""
    names = job.trackers if ranks.rank() == 0 else ()
    shown = settings.model_dump(mode="json")
    with following(names, folder, name=job.out.name, identity=identity[:32], settings=shown) as follow:

        def watch(progress: Progress) -> None:
            follow()
            job.watch(progress)

        yield watch


def check_divides(settings: TrainSettings) -> bool:
    """Whether the model is divided over several processes. Raises UsageError where it cannot be."""
    divides = ranks.size() > 1 and settings.parallel == "fsdp"
    if divides and settings.lora and settings.lora.quantize:
        raise UsageError("parallel: fsdp cannot divide weights of 4 bits; use parallel: ddp, or no lora.quantize")
    return divides


def load_start(job: Job, settings: TrainSettings, head: Head, *, divides: bool = False) -> Loaded:
    """The start: in fp32 if all of it is trained, frozen weights also as they are stored. divides: by FSDP, later."""
    lora = settings.lora
    dtype = "float32"
    if lora and not divides and settings.precision != "float32":
        dtype = "auto"
    if lora and lora.quantize:
        dtype = str(compute_dtype(settings, pick_device(job.device).type)).removeprefix("torch.")
    return load(
        job.start,
        dtype=dtype,
        device="cpu" if divides else job.device,
        head=head,
        quantize=lora.quantize if lora else None,
    )


def counts_of(data: dict[str, Data]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in data.items():
        compared = {"comparisons": each.num_comparisons} if each.num_comparisons else {}
        labelled = {f"label_source {source}": num for source, num in sorted(each.label_sources.items())}
        found[name] = {"rows": len(each), **compared, "cut": each.num_cut, **each.left_out, **labelled}
    return found


def heed(job: Job, found: Iterator[rows.Row]) -> Iterator[rows.Row]:
    """The rows, until the job is asked to stop: StoppedError."""
    for row in found:
        if job.should_stop():
            raise StoppedError(f"{job.out}: stopped before the first step; the same command begins again")
        yield row


def read_data(
    job: Job, settings: TrainSettings, kind: Kind, chat: Chat, context: int
) -> tuple[dict[str, Data], list[rows.Tally]]:
    """Tokens of both splits. Raises UsageError (2) if all rows are too long, as `tell_read` if they are refused."""
    tallies: list[rows.Tally] = []
    max_length = min(settings.max_length or context, context)
    cure = _cure(settings, max_length < context)
    data: dict[str, Data] = {}
    for split in rows.SPLITS:
        own: list[rows.Tally] = []
        found = heed(job, rows.read(job.sources, kind=kind, split=split, shares=job.shares, tallies=own))
        data[split] = tokenise(found, chat, max_length=max_length, too_long=settings.too_long)
        tell_read(job, split, data[split], own)
        tallies += own
        if lost := data[split].left_out["too_long"]:
            id, length = data[split].longest
            job.say(
                f"{split}: {lost} rows longer than {max_length} tokens left out, the longest {id} with {length}; {cure}"
            )
    if not len(data["train"]):
        id, length = data["train"].longest
        raise UsageError(f"all rows are longer than {max_length} tokens, the longest {id} with {length}; {cure}")
    return data, tallies


def _cure(settings: TrainSettings, could_be_longer: bool) -> str:
    """What helps against rows that are too long; a cut never touches an answer."""
    longer = "set max_length higher" if could_be_longer else "take a model with more context"
    if settings.too_long == "drop":
        return f"{longer}, or set too_long: cut"
    return f"their answers alone leave a prompt no room: {longer}, or shorten them"


def tell_read(job: Job, split: rows.Split, data: Data, tallies: Sequence[rows.Tally]) -> None:
    """Says what was read of each source, and has the data count its label sources and what was left out there, too.

    tallies: of this data. Raises IncompleteError (3) if the chat template refuses rows, and none to train on is left.
    """
    for tally in tallies:
        job.say(str(tally))
        data.label_sources.update(tally.label_sources)
        data.left_out.update(tally.left_out)
    if not data.refused:
        return
    found = f"{split}: bad_roles {data.left_out['bad_roles']} left out (first {data.refused})"
    if split == "train" and not len(data):
        raise IncompleteError(f"{found}; no row is left: take a model whose template takes such turns")
    job.say(found)


def _keep_pad_apart(model: Any, tokenizer: Any) -> None:
    """A padding token that is no end of turn: transformers reads the score at the last token that is no padding."""
    names = ("pad_token", "unk_token", "bos_token")
    found = [name for name in names if getattr(tokenizer, name) not in (None, tokenizer.eos_token)]
    if found:
        tokenizer.pad_token = getattr(tokenizer, found[0])
        model.config.pad_token_id = tokenizer.pad_token_id
