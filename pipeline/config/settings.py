"""Every setting of a run, with its default. Sections are named like the commands; unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config.addresses import check_addresses, origins

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EngineSettings(Section):
    """Which model answers, and how it is reached. price_in, price_out: of a million tokens, in any currency."""

    backend: Literal["auto", "transformers", "vllm", "server", "scripted"] = "auto"
    model: str | None = None
    revision: str | None = None
    base_urls: tuple[str, ...] = ()
    api_key_env: str = "OPENAI_API_KEY"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    context: Count | None = None
    concurrency: Count | None = None
    adapter: str | None = None
    quantization: str | None = None
    tensor_parallel: Count = 1
    data_parallel: Count | Literal["auto"] = "auto"
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    deterministic: bool = False
    style: Literal["chat", "few-shot"] = "chat"
    script: str | None = None
    price_in: Annotated[float, Field(ge=0)] | None = None
    price_out: Annotated[float, Field(ge=0)] | None = None

    @field_validator("base_urls")
    @classmethod
    def _are_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        check_addresses(urls)
        return urls


OF_A_MODEL = ("revision", "adapter", "quantization")
"""Keys that a section with another model does not have from `engine`."""


class Source(Section):
    path: str
    tags: tuple[str, ...] = ()
    limit: Count | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


class PromptsSettings(Section):
    """shard_size: prompts in one part; a part is the unit that is published, and held in memory while in flight."""

    sources: tuple[Source, ...] = ()
    shard_size: Count = 1000


class GenerateSettings(Section):
    """models: several generators; each section says what differs from `engine` and makes `samples` completions."""

    samples: Count = 2
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    models: tuple[dict[str, Any], ...] = ()


class CritiqueReviseSettings(Section):
    rounds: Count = 2
    draw: Literal["uniform", "weighted", "cover"] = "weighted"
    direct: bool = False
    early_stop: bool = False
    verify: bool = True
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0.0)] = 0.0


class RankSettings(Section):
    """tie_band: how far from 0.5 a probability must be to prefer one candidate. max_tokens: of a chain of thought."""

    mode: Literal["pairwise", "graded"] = "pairwise"
    order: Literal["average", "agree-or-tie", "single"] = "average"
    principles: Count | Literal["all"] = 1
    candidates: Literal["ends", "all"] = "ends"
    chain_of_thought: bool = False
    clamp: tuple[Share, Share] | None = None
    tie_band: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.05
    max_tokens: Count | None = None


class HelpfulSettings(Section):
    """Helpful data mixed into `sft`. share: of all rows of the mix."""

    path: str
    share: Annotated[float, Field(gt=0.0, lt=1.0)]


class SplitSettings(Section):
    sft: Share = 0.45
    preference: Share = 0.45
    test: Share = 0.10

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitSettings:
        total = self.sft + self.preference + self.test
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"the shares add up to {total:g}; make them add up to 1")
        return self


FILTERS = ("role_confusion", "meta_prefix", "repeated_ngrams", "unchanged", "same_text")


class ExportSettings(Section):
    sft: Literal["best", "last", "all", "improved"] = "best"
    pairs: Literal["best-worst", "all", "revision-draft"] = "best-worst"
    margin: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    helpful: HelpfulSettings | None = None
    split: SplitSettings = SplitSettings()
    filters: tuple[Literal[FILTERS], ...] = FILTERS  # type: ignore[valid-type]
    format: Literal["messages", "text"] = "messages"


Trainer = Literal["sft", "rm", "dpo", "rrhf", "ppo"]


class RecipeSettings(Section):
    """phases: 1 ends with the SFT model. pairs: what preferences are made from.

    trainers: in whatever order, they run in that of `Trainer`. auto: sft, rm and dpo where the run has a model of its
    own, and a GPU or the embedded model.
    """

    phases: Annotated[int, Field(ge=1, le=2)] = 2
    pairs: Literal["samples", "revisions", "both"] = "samples"
    trainers: tuple[Trainer, ...] | Literal["auto"] = "auto"


class LoraSettings(Section):
    """Adapters of rank r beside frozen weights, scaled by alpha / r (Hu et al. 2021, arXiv 2106.09685).

    quantize: of the frozen weights, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
    """

    r: Count = 16
    alpha: Count = 32
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    quantize: Literal["4bit"] | None = None


class TrainSettings(Section):
    """What all trainers share. batch_size: prompts in one step of the optimiser, however they fit into memory.

    warmup: share of all steps. eval_every, save_every: steps; if not set, once an epoch, and a checkpoint also after
    some time. patience: evaluations without a better one until training stops. microbatch_tokens: what goes through the
    model at a time. select: `min METRIC` or `max METRIC`, of an evaluation: whose weights are kept.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    batch_size: Count = 32
    epochs: Count = 1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Count | None = None
    too_long: Literal["drop", "cut"] = "drop"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    microbatch_tokens: Count = 8192
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = None
    parallel: Literal["ddp", "fsdp"] = "ddp"
    eval_every: Count | None = None
    save_every: Count | None = None
    select: Annotated[str, Field(pattern="^(min|max) eval/[^ ]+$")] = "min eval/loss"
    patience: Count | None = None


class TrainSftSettings(TrainSettings):
    """num_reward_prompts: test prompts that an evaluation answers where a reward model is given."""

    epochs: Count = 3
    num_reward_prompts: Count = 64


class TrainRmSettings(TrainSettings):
    """center_coef: weight of the term that keeps a prompt's mean score near 0."""

    learning_rate: Annotated[float, Field(gt=0)] = 9e-6
    batch_size: Count = 64
    center_coef: Annotated[float, Field(ge=0)] = 0.01


class TrainDpoSettings(TrainSettings):
    """length_normalised: log-probabilities per token. label_smoothing: of the sigmoid loss."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    batch_size: Count = 64
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    length_normalised: bool = False

    @model_validator(mode="after")
    def _smooths_the_sigmoid(self) -> TrainDpoSettings:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing is of loss: sigmoid; leave it out with loss: ipo")
        return self


class TrainRrhfSettings(TrainSettings):
    """rrhf_weight: of the ranking term, beside the best completion's negative log-likelihood.

    resample_every: steps between two drawings of `num_samples` new completions to each coming prompt.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    epochs: Count = 3
    rrhf_weight: Annotated[float, Field(ge=0)] = 1.0
    resample_every: Count | None = None
    num_samples: Count = 4
    temperature: Annotated[float, Field(gt=0)] = 1.0


class TrainPpoSettings(TrainSettings):
    """batch_size: prompts of a step, each with num_samples completions of up to max_tokens.

    reward: `model`, `policy` (mean log-probability, as RRHF ranks), `judge` (against the starting model's answer),
    `graded` (1-10 by the judge), or `FILE.py:FUNCTION`. reencode: a reward model with another tokenizer reads
    the text again.
    sampler: what draws completions: training itself (decode), or vLLM beside it with the same weights.
    minibatch_size: prompts of one update of the optimiser, num_inner_epochs times over the batch.
    advantages: of generalised advantage estimation with a value function, or of three baselines without one.
    value: a model of its own, or a head on the policy's backbone (joint). value_start: what it begins as.
    kl_target: if set, nats a completion that kl_coef is steered to, within about kl_horizon episodes.
    max_approxkl: nats a token from the sampling policy at which the rest of a step's updates is left out.
    cliprange_reward: bound of scores. missing_eos_penalty: taken from the score of a completion that did not end.
    ptx_coef: of the loss on ptx_data, ptx_per_prompt rows of it for each prompt.
    kl_budget: nats a completion; what is further from the start is not kept. num_logged: completions a step.
    """

    batch_size: Count = 64
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    select: Annotated[str, Field(pattern="^(min|max) eval/[^ ]+$")] = "max eval/scores"
    reward: Annotated[str, Field(pattern=r"^(model|policy|judge|graded|.+\.py:\w+)$")] = "model"
    reencode: bool = False
    num_samples: Count = 1
    max_tokens: Count = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    sampler: Literal["decode", "vllm"] = "decode"
    minibatch_size: Count = 64
    num_inner_epochs: Count = 1
    advantages: Literal["gae", "policy-gradient", "rloo", "group-relative"] = "gae"
    value: Literal["separate", "joint"] = "separate"
    value_start: Literal["reward", "zero"] = "reward"
    value_learning_rate: Annotated[float, Field(gt=0)] | None = None
    gamma: Share = 1.0
    lam: Share = 0.95
    cliprange: Annotated[float, Field(gt=0)] = 0.2
    cliprange_value: Annotated[float, Field(gt=0)] = 0.2
    vf_coef: Annotated[float, Field(ge=0)] = 0.1
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_target: Annotated[float, Field(gt=0)] | None = None
    kl_horizon: Annotated[float, Field(gt=0)] = 10000.0
    max_approxkl: Annotated[float, Field(gt=0)] | None = None
    whiten_rewards: bool = False
    cliprange_reward: Annotated[float, Field(gt=0)] | None = None
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    ptx_data: str | None = None
    ptx_per_prompt: Count = 1
    kl_budget: Annotated[float, Field(gt=0)] | None = None
    num_logged: Annotated[int, Field(ge=0)] = 4

    @model_validator(mode="after")
    def _fits_together(self) -> TrainPpoSettings:
        if self.advantages in ("rloo", "group-relative") and self.num_samples < 2:
            raise ValueError(f"advantages: {self.advantages} compares samples of a prompt; set num_samples: 2 or more")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target: steers kl_coef by factors, which leave 0 as it is; set kl_coef to more than 0")
        if self.ptx_data is not None and self.ptx_coef == 0:
            raise ValueError("ptx_data: has no effect while ptx_coef is 0; set both, or none")
        return self


class RunSettings(Section):
    """max_time: seconds after which the run stops, resumable. budget_tokens, budget_cost: likewise, of new replies.

    trackers: where trainings show their metrics besides metrics.jsonl.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_failed_share: Share = 0.01
    budget_tokens: Count | None = None
    budget_cost: Annotated[float, Field(gt=0)] | None = None
    max_time: Annotated[float, Field(gt=0)] | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


class Settings(Section):
    """All sections. `judge` and `critic` say only what differs from `engine`.

    critic: empty: every model criticises and revises its own drafts. A section: that model does both, for all drafts.
    A list: these models criticise, a draft's own author revises.
    """

    constitution: str | None = None
    engine: EngineSettings = EngineSettings()
    judge: dict[str, Any] = {}
    critic: dict[str, Any] | tuple[dict[str, Any], ...] = {}
    prompts: PromptsSettings = PromptsSettings()
    generate: GenerateSettings = GenerateSettings()
    critique_revise: CritiqueReviseSettings = CritiqueReviseSettings()
    rank: RankSettings = RankSettings()
    export: ExportSettings = ExportSettings()
    recipe: RecipeSettings = RecipeSettings()
    train_sft: TrainSftSettings = TrainSftSettings()
    train_rm: TrainRmSettings = TrainRmSettings()
    train_dpo: TrainDpoSettings = TrainDpoSettings()
    train_rrhf: TrainRrhfSettings = TrainRrhfSettings()
    train_ppo: TrainPpoSettings = TrainPpoSettings()
    run: RunSettings = RunSettings()

    def engine_for(self, section: dict[str, Any]) -> EngineSettings:
        """The engine section with what another one says differently; `model_fields_set` are the keys that it says.

        `revision`, `adapter` and `quantization` belong to the model they were named with, and a key to the endpoints:
        a section that names any other one and no `api_key_env` of its own sends none (it is then empty).
        """
        inherited = self.engine.model_dump()
        if section.get("model", self.engine.model) != self.engine.model:
            inherited |= dict.fromkeys(OF_A_MODEL)
        found = EngineSettings.model_validate({**inherited, **section})
        values = dict(found)
        if "api_key_env" not in section and not set(origins(found.base_urls)) <= set(origins(self.engine.base_urls)):
            values["api_key_env"] = ""
        return EngineSettings.model_construct(_fields_set=set(section), **values)

    @field_validator("critic", mode="before")
    @classmethod
    def _is_section_or_list(cls, critic: Any) -> Any:
        listed = critic if isinstance(critic, list | tuple) else [critic]
        if not all(isinstance(one, dict) for one in listed):
            raise ValueError("write a section, such as {model: NAME}, or a list of them")
        return critic

    @property
    def generators(self) -> dict[str, EngineSettings]:
        """Who drafts, by the place where the settings say so, in the order of the samples."""
        models = self.generate.models
        found = {f"generate.models[{n}]": self.engine_for(model) for n, model in enumerate(models)}
        return found or {"engine": self.engine}

    @property
    def critics(self) -> dict[str, EngineSettings]:
        """Who criticises, by place; empty if every model criticises its own drafts."""
        if isinstance(self.critic, dict):
            return {"critic": self.engine_for(self.critic)} if self.critic else {}
        return {f"critic[{n}]": self.engine_for(critic) for n, critic in enumerate(self.critic)}

    @property
    def engines(self) -> dict[str, EngineSettings]:
        """Every engine of the recipe, by place; equal ones each time that they are named."""
        return {**self.generators, **self.critics, "judge": self.engine_for(self.judge)}
