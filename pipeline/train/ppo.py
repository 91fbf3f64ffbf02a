"""PPO from AI feedback: Ouyang et al. 2022 (arXiv 2203.02155), on the algorithm of Schulman et al. 2017 (1707.06347).

A prompt is answered once (or num_samples times), and the answer gets one score: a bandit. Every token is charged for
its KL from the starting model. The details are those of Ziegler et al. 2019 (1909.08593) as Huang et al. list them.
Plain policy gradient, RLOO and group-relative advantages run through the same loop. Left out: rewards within an answer,
tools, several turns, and an asynchronous sampler.

Step, seed and settings say which prompts a step takes, what is drawn and how minibatches are cut; so a checkpoint needs
weights, optimisers, their average, the KL coefficient and the step, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.config.settings import TrainPpoSettings
from pipeline.errors import IncompleteError, StoppedError, UsageError
from pipeline.lm.load import check_tokenizer, context_of, ends, fingerprint, load_config, load_tokenizer, pick_device
from pipeline.lm.templates import Chat
from pipeline.records import Line
from pipeline.train import ranks, rows
from pipeline.train.batches import Data, batch_at, steps_per_epoch, tokenise
from pipeline.train.best import Best
from pipeline.train.curves import draw_reward_kl
from pipeline.train.loop import Outcome, Progress, compute_dtype
from pipeline.train.memory import measure
from pipeline.train.networks import Networks, open_networks
from pipeline.train.optimizer import learning_rate
from pipeline.train.output import check_out, identity_of, publish, published, work_folder
from pipeline.train.plan import Plan
from pipeline.train.ppo_run import EVALUATED, Clock, Run, Task, logged
from pipeline.train.ppo_update import aim, check_finite, objective_metrics, shaped_scores, update
from pipeline.train.prompts import Prompts, tokenise_prompts
from pipeline.train.rewards import Source, check_reencoding, open_function, open_reward_model
from pipeline.train.samplers import Sampler
from pipeline.train.scorers import outline
from pipeline.train.shards import fill
from pipeline.train.stage import (
    Job,
    Report,
    check_divides,
    describe,
    followed,
    heed,
    load_start,
    tell_read,
)
from pipeline.train.trackers import check_installed


def train_ppo(
    job: Job,
    settings: TrainPpoSettings,
    *,
    reward_model: str | None = None,
    judge: Source | None = None,
    sampler: Sampler | None = None,
) -> Report:
    """Reads, trains and publishes. reward_model: for the rewards `model` and `policy`; judge: for the other ones.

    sampler: what the settings' sampler is, unless it is training itself.
    """
    check_installed(job.trackers)
    ranks.first(lambda: check_out(job.out, job.start, trainer="ppo"))
    _check_sampler(settings, sampler)
    divides = ranks.together(lambda: check_divides(settings))
    loaded = ranks.together(lambda: load_start(job, settings, "language", divides=divides))
    policy, start = loaded.model, loaded.fingerprint
    check_tokenizer(loaded.tokenizer, policy.get_input_embeddings().num_embeddings, job.start)
    chat = Chat(loaded.tokenizer, eos=ends(policy.config.get_text_config(), policy.generation_config))
    context = context_of(policy.config)
    prompts, tallies = ranks.together(lambda: _read_prompts(job, settings, chat, context))
    ptx = ranks.together(lambda: _read_ptx(job, settings, chat, context, tallies))
    counts = {name: dict(each.counts) for name, each in prompts.items()}
    source = judge or ranks.together(lambda: _open_reward(settings, reward_model, job, start["tokenizer"]))
    data = {name: each.data for name, each in prompts.items()} | ({"ptx": ptx} if ptx else {})
    made_with = [job.seed, start, source.fingerprint, *([each.digest, each.ids] for each in data.values())]
    identity = identity_of("ppo", settings, made_with)
    if found := ranks.first(lambda: published(job.out, identity)):
        return Report(job.out, Outcome(found["step"], found["metrics"]), counts, is_new=False)
    folder = ranks.first(lambda: work_folder(job.out, identity, job.say))
    if settings.advantages == "gae" and settings.value_start == "reward" and source.model is None:
        job.say("the value function begins at zero: no reward model here that reads the policy's tokens")
    networks = open_networks(
        policy, job.start, source.model, settings, device=job.device, seed=job.seed, divides=divides
    )
    parts = (prompts["train"], prompts["test"], ptx)
    task = Task(networks, chat, *parts, source.score, settings, folder, job.seed, source.measure, sampler)
    with followed(job, settings, folder, identity) as watch:
        outcome = optimise(task, watch=watch, warn=job.say, should_stop=job.should_stop)
    description = describe(
        job,
        settings,
        outcome,
        trainer="ppo",
        identity=identity,
        start=start,
        data={name: {"sha256": each.digest, "rows": len(each)} for name, each in data.items()},
        tallies=tallies,
    )
    description["reward"] = {"name": reward_model or settings.reward, **source.fingerprint}
    _publish(job, settings, networks, loaded.tokenizer, folder, description)
    return Report(job.out, outcome, counts, is_new=True)


def _publish(
    job: Job, settings: TrainPpoSettings, networks: Networks, tokenizer: Any, folder: Path, description: dict[str, Any]
) -> None:
    """The policy as it is now, whole, with its curves and samples."""
    policy = networks.policy
    if networks.skeleton is not None:
        fill(networks.skeleton, policy)
        policy = networks.skeleton

    def out() -> None:
        extras = ["samples.jsonl"]
        if draw_reward_kl(folder / "metrics.jsonl", folder / "reward_kl.png", kl_budget=settings.kl_budget):
            extras.append("reward_kl.png")
        publish(policy, networks.adapted, tokenizer, job, folder, description, extras=extras)

    ranks.first(out)


def optimise(
    task: Task,
    *,
    watch: Callable[[Progress], None] = lambda progress: None,
    warn: Callable[[str], None] = lambda message: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains the networks in place, from the newest checkpoint in `folder/checkpoints` if there is one.

    Writes `metrics.jsonl` and `samples.jsonl`. The policy is then that of the best evaluation within the KL budget.
    Raises DivergedError (7) at the step whose loss, gradient or score is not finite, StoppedError (75) when asked to.
    """
    settings, run = task.settings, Run(task)
    run.resume(warn)
    if run.step == 0:
        run.metrics.append([{"step": 0, **run.evaluate()}])
    while run.pending or (run.step < run.total and not run.has_stalled()):
        clock = Clock()
        line, run.pending = run.pending or take_step(run, clock), None
        saves = run.is_due(settings.save_every)
        if run.is_due(settings.eval_every):
            if saves:
                run.save(line)
            line |= run.evaluate()
            clock.lap("eval")
        run.metrics.append([line | clock.seconds])
        watch(Progress(run.step, run.total, run.num_tokens, line))
        stops, is_late = ranks.any_of(should_stop(), run.checkpoints.is_late and not settings.save_every)
        if stops or saves or is_late:
            run.save()
        if stops and run.step < run.total:
            at = f"{task.folder}: stopped after step {run.step} of {run.total}"
            raise ranks.shared(StoppedError(f"{at}; the same command goes on here"))
    return run.finish(warn)


def take_step(run: Run, clock: Clock) -> Line:
    """Rollouts, their scores, and the updates that follow. Returns the step's line of metrics.jsonl."""
    task, settings = run.task, run.settings
    batch = batch_at(run.step, num_rows=len(task.prompts), batch_size=settings.batch_size, seed=task.seed)
    rollouts = run.roll_out(task.prompts, batch, step=run.step)
    clock.lap("rollout")

    scores = shaped_scores(run.score(rollouts), rollouts.has_ended, settings)
    check_finite(run.where, {"score": float(scores.sum())})
    targets = aim(rollouts, scores, settings, kl_coef=run.kl_coef)
    objective = objective_metrics(
        rollouts, scores, targets, kl_coef=run.kl_coef, has_values=settings.advantages == "gae"
    )
    objective |= {f"objective/{name}": value for name, value in task.measure().items()}
    clock.lap("score")

    rate = learning_rate(run.step, run.total, settings) / settings.learning_rate
    learned = update(
        task.networks,
        run.learners,
        rollouts,
        targets,
        ptx=task.ptx,
        step=run.step,
        seed=task.seed,
        rate=rate,
        where=run.where,
    )
    run.average_weights()
    clock.lap("update")

    run.step += 1
    run.num_episodes += len(rollouts.texts)
    run.count_tokens(rollouts)
    line = {**run.place(), "lr": rate * settings.learning_rate, **learned, **objective}
    line["objective/kl_coef"] = run.kl_coef
    run.adapt_kl_coef(objective["objective/kl"], len(rollouts.texts))
    run.samples.append(logged(run.step, rollouts, scores, settings.num_logged))
    return line


def plan_ppo(job: Job, settings: TrainPpoSettings, *, reward_model: str | None = None) -> Plan:
    """Reads and tokenises, loads no weights, and refuses what `train_ppo` refuses.

    Reward model and value model count as if of the start's size. A policy that is divided is whole while it decodes,
    when there are no activations; the reward model always is.
    """
    check_installed(job.trackers)
    divides = check_divides(settings)
    config, tokenizer = load_config(job.start), load_tokenizer(job.start)
    check_tokenizer(tokenizer, config.get_text_config().vocab_size, job.start)
    _check_reward(settings, reward_model, fingerprint(config, tokenizer, dtype=torch.float32)["tokenizer"])
    chat, context = Chat(tokenizer), context_of(config)
    prompts, tallies = _read_prompts(job, settings, chat, context)
    _read_ptx(job, settings, chat, context, tallies)
    if len(prompts["test"]) and settings.reward not in ("judge", "graded"):  # a judge adds what it measures
        Best(settings.select).check(EVALUATED)
    train, longest = prompts["train"].data, Data()
    for row in range(len(train)):
        example = rows.Row(train.ids[row], [], (), 1.0, (), "policy")
        longest.add(example, train.group(row).prompt.tolist(), [[0] * settings.max_tokens] * settings.num_samples)
    one = measure(job.start, longest, settings, job.device, "language")
    trained = 2 if settings.advantages == "gae" and settings.value == "separate" else 1
    has_scorer = settings.reward in ("model", "policy")
    if divides:
        copies, dtype = trained + 1 + has_scorer * ranks.size(), compute_dtype(settings, pick_device(job.device).type)
        decoding = one.weights * ranks.size() * dtype.itemsize // 4
    else:
        frozen, decoding = 1 + has_scorer, 0
        copies = max(trained, frozen) if settings.lora else trained + frozen  # adapters lie on the frozen ones
    memory = one._replace(
        weights=one.weights * copies,
        gradients=one.gradients * trained,
        optimizer=one.optimizer * trained,
        activations=max(one.activations * trained, decoding),
    )
    per_epoch = steps_per_epoch(len(train), settings.batch_size)
    steps = per_epoch * settings.epochs
    evaluations = 1 + -(-steps // (settings.eval_every or per_epoch))
    answers = settings.num_samples * (len(train) * settings.epochs + len(prompts["test"]) * evaluations)
    lacks = f"does not fit into {memory.room / 2**20:,.0f} MiB; lower microbatch_tokens, or take value: joint"
    counts = {name: dict(each.counts) for name, each in prompts.items()}
    return Plan(counts, steps, memory, "" if memory.fits else lacks, answers)


def _read_prompts(
    job: Job, settings: TrainPpoSettings, chat: Chat, context: int
) -> tuple[dict[str, Prompts], list[rows.Tally]]:
    """Of both splits, each short enough for a completion. Raises UsageError (2) if none is."""
    tallies: list[rows.Tally] = []
    length = min(settings.max_length or context, context)
    room = length - settings.max_tokens
    if room < 1:
        said = f"{settings.max_tokens} leave no prompt of the {length} tokens"
        raise UsageError(f"train_ppo.max_tokens: {said}; lower it")
    cure = "lower max_tokens" + (", or set too_long: cut" if settings.too_long == "drop" else "")
    found: dict[str, Prompts] = {}
    for split in rows.SPLITS:
        own: list[rows.Tally] = []
        read = heed(job, rows.read(job.sources, kind="prompts", split=split, shares=job.shares, tallies=own))
        found[split] = tokenise_prompts(read, chat, max_length=room, too_long=settings.too_long)
        tell_read(job, split, found[split].data, own)
        tallies += own
        if lost := found[split].data.left_out["too_long"]:
            job.say(f"{split}: {lost} prompts longer than {room} tokens left out; {cure}")
    if not len(found["train"]):
        raise UsageError(f"all prompts are longer than {room} tokens; {cure}")
    for key in ("kl_budget", "patience"):
        if getattr(settings, key) is not None and not len(found["test"]):
            raise UsageError(f"train_ppo.{key}: no test prompt to evaluate on; leave it away, or give more prompts")
    return found, tallies


def _read_ptx(job: Job, settings: TrainPpoSettings, chat: Chat, context: int, tallies: list[rows.Tally]) -> Data | None:
    """What keeps the policy's language up, plain texts too; the job's own sources if none is named.

    Raises UsageError (2) if all rows are too long, IncompleteError (3) if none teaches anything.
    """
    if not settings.ptx_coef:
        return None
    sources = [rows.parse_source(settings.ptx_data)] if settings.ptx_data else job.sources
    own: list[rows.Tally] = []
    found = heed(job, rows.read(sources, kind="language", split="train", shares=job.shares, tallies=own))
    max_length = min(settings.max_length or context, context)
    data = tokenise(found, chat, max_length=max_length, too_long=settings.too_long)
    empty = data.left_out["empty"]
    tell_read(job, "train", data, own)
    tallies += own
    if empty:
        job.say(f"ptx: empty {empty} left out, texts of one token")
    if lost := data.left_out["too_long"]:
        id, length = data.longest
        cure = "shorten them" if settings.too_long == "cut" else "set too_long: cut"
        said = f"longer than {max_length} tokens, the longest {id} with {length}; {cure}"
        if not len(data):
            raise UsageError(f"train_ppo.ptx_data: all rows are {said}")
        job.say(f"ptx: {lost} rows left out, {said}")
    if not len(data):
        raise IncompleteError("train_ppo.ptx_data: texts of one token alone; nothing to train on")
    return data


def _check_sampler(settings: TrainPpoSettings, sampler: Sampler | None) -> None:
    if settings.sampler != "decode" and sampler is None:
        raise UsageError(f"train_ppo.sampler: {settings.sampler}: no sampler here")
    if settings.sampler == "vllm" and ranks.size() > 1:
        raise ranks.shared(UsageError("train_ppo.sampler: vllm serves one process; start it without torchrun"))


def _check_reward(settings: TrainPpoSettings, name: str | None, tokenizer: str) -> None:
    """What `_open_reward` refuses, without weights. tokenizer: digest of the policy's."""
    if settings.reward in ("judge", "graded"):
        return
    if settings.reward not in ("model", "policy"):
        open_function(settings.reward)
    elif name is None:
        raise _no_scorer(settings)
    else:
        scorer = outline(name, "reward" if settings.reward == "model" else "policy")
        check_reencoding(name, scorer.fingerprint["tokenizer"] != tokenizer, reencode=settings.reencode)


def _no_scorer(settings: TrainPpoSettings) -> UsageError:
    return UsageError(f"train_ppo.reward: {settings.reward}: no model that scores; use --reward-model MODEL")


def _open_reward(settings: TrainPpoSettings, name: str | None, job: Job, tokenizer: str) -> Source:
    if settings.reward in ("judge", "graded"):
        raise UsageError(f"train_ppo.reward: {settings.reward}: no judge here")
    if settings.reward not in ("model", "policy"):
        return open_function(settings.reward)
    if name is None:
        raise _no_scorer(settings)
    return open_reward_model(
        name,
        "reward" if settings.reward == "model" else "policy",
        tokenizer=tokenizer,
        reencode=settings.reencode,
        max_tokens=settings.microbatch_tokens,
        device=job.device,
    )
