"""A model folder or hub name -> model, tokenizer and what identifies them, whatever machine they lie on."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.utils import cached_file, is_bitsandbytes_available, logging

from pipeline import hub
from pipeline.errors import EngineRefused, ResourceError
from pipeline.lm import products
from pipeline.lm.adapter import adapter_digest, base_of, merge
from pipeline.lm.folder import check_name
from pipeline.records import digest

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
Head = Literal["language", "score"]
_HASH_BYTES = 1 << 24
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


class Loaded(NamedTuple):
    """model: in evaluation mode. tokenizer: with the model's chat template, if it has one.

    fingerprint: digests of config, tokenizer and weights (or the hub commit), the dtype, and the tokens at which the
        generation config ends a reply; never a path.
    """

    model: Any
    tokenizer: Any
    fingerprint: dict[str, str]


def load(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    head: Head = "language",
    quantize: Literal["4bit"] | None = None,
) -> Loaded:
    """Loads a folder or a hub name; safetensors only, no code from the model's repository.

    model: may be the folder of a LoRA adapter, which becomes part of its model's weights.
    head: score for a reward model, one number a row; a language model gets a head of zeros in place of its own.
    dtype: auto (float32 on a CPU, else what the weights are stored in), stored, float32, bfloat16, float16.
    device: auto (CUDA, then MPS, then CPU) or a torch device. quantize: the weights of all layers, to be trained on
    only. Raises EngineRefused, one line, when it cannot be.
    """
    logging.disable_progress_bar()  # what goes to stderr is the caller's affair
    where, base = pick_device(device), base_of(model)
    config, tokenizer = load_config(model, revision=revision), load_tokenizer(model, revision=revision)
    if head == "language" and any("SequenceClassification" in name for name in config.architectures or ()):
        raise EngineRefused(f"model {model}: a reward model, which says nothing; give the language model it came from")
    kind = pick_dtype(dtype, where, config)
    # The fused attention kernels leave out the soft cap on attention scores (Gemma 2).
    attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"
    options = {"dtype": kind, "use_safetensors": True, "attn_implementation": attention}
    if quantize:
        options |= _quantization(base != model, where, kind)
    if head == "score":
        loaded = _open_reward_model(base, revision, **options)
    else:
        loaded = _open(AutoModelForCausalLM, base, revision, **options)
    if base != model:
        loaded = merge(loaded, Path(model))
    try:
        loaded = (_without_inference_kernels(loaded) if quantize else loaded.to(where)).eval()
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"{model}: does not fit into the memory of {where}; use engine.device: cpu") from error
    products.widen(loaded)
    identity = {
        **fingerprint(config, tokenizer, dtype=kind),
        "weights": _weights(model, config, revision),
        **({"quantize": quantize} if quantize else {}),
        "eos": json.dumps(getattr(getattr(loaded, "generation_config", None), "eos_token_id", None)),
    }
    return Loaded(loaded, tokenizer, identity)


class Identity(NamedTuple):
    """Tokenizer and identity of a model whose weights are loaded elsewhere; `load` gives the same fingerprint.

    dtype: of the weights when they are loaded. eos: tokens that end a reply. context: positions, None if unknown.
    """

    tokenizer: Any
    dtype: torch.dtype
    eos: list[int]
    context: int | None
    fingerprint: dict[str, str]


def identify(model: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto") -> Identity:
    """Everything about a folder or a hub name but its weights, which are only hashed. Raises EngineRefused."""
    config, tokenizer = load_config(model, revision=revision), load_tokenizer(model, revision=revision)
    try:
        generation = GenerationConfig.from_pretrained(base_of(model), revision=revision)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    kind = pick_dtype(dtype, pick_device(device), config)
    text = config.get_text_config()
    identity = {
        **fingerprint(config, tokenizer, dtype=kind),
        "weights": _weights(model, config, revision),
        "eos": json.dumps(generation.eos_token_id),
    }
    context = getattr(text, "max_position_embeddings", None)
    return Identity(tokenizer, kind, ends(text, generation), context, identity)


def release_memory() -> None:
    """Gives back the accelerator's memory of models that nobody holds any more, for an engine that starts next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ends(*configs: Any) -> list[int]:
    """Tokens that end a reply by a model's own configurations."""
    values = [getattr(config, "eos_token_id", None) for config in configs]
    return [token for value in values if value is not None for token in (value if isinstance(value, list) else [value])]


def load_tokenizer(model: str, *, revision: str | None = None) -> Any:
    """The tokenizer alone. Raises EngineRefused."""
    has_own = Path(model, "tokenizer.json").exists()
    tokenizer = _open(AutoTokenizer, model if has_own else base_of(model), revision)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise EngineRefused(f"model {model}: its tokenizer has no tokenizer.json form; save it as a fast tokenizer")
    return tokenizer


def check_tokenizer(tokenizer: Any, num_embeddings: int, name: str) -> None:
    """Raises EngineRefused unless conversations become tokens that the model of this name has embeddings for."""
    if not tokenizer.chat_template:
        raise EngineRefused(
            f"model {name}: no chat template; give a chat model, or put a chat_template.jinja in its folder"
        )
    if len(tokenizer) > num_embeddings:
        raise EngineRefused(
            f"model {name}: {len(tokenizer)} tokens, but {num_embeddings} embeddings; give its own tokenizer"
        )


def context_of(config: Any) -> int:
    """Tokens of the longest text; a number that is never reached if the model does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def load_config(model: str, *, revision: str | None = None) -> Any:
    """The configuration alone, of an adapter's folder that of its model. Raises EngineRefused."""
    return _open(AutoConfig, base_of(model), revision)


def _open(auto: Any, model: str, revision: str | None, **options: Any) -> Any:
    check_name(model, "its name")
    try:
        return auto.from_pretrained(
            model, revision=revision, trust_remote_code=False, local_files_only=not is_here_or_hub_is(model), **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EngineRefused(_refusal(model, revision, error)) from error


def is_here_or_hub_is(model: str) -> bool:
    """Else a hub's model is looked for in its cache only."""
    return Path(model).is_dir() or hub.is_reachable()


def _quantization(is_adapter: bool, where: torch.device, kind: torch.dtype) -> dict[str, Any]:
    """NF4 with nested scales (Dettmers et al. 2023, section 3), for bitsandbytes. kind: of the arithmetic."""
    if is_adapter:
        raise EngineRefused("quantize: 4bit cannot start from an adapter; start from the merged model beside it")
    if not is_bitsandbytes_available():
        raise EngineRefused("quantize: 4bit needs bitsandbytes: pip install 'constitutional-pipeline[qlora]'")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=kind,
    )
    return {"quantization_config": config, "device_map": {"": where}}


def _without_inference_kernels(model: Any) -> Any:
    """Those of bitsandbytes for a CPU have no gradient, and are chosen by mode, which is evaluation in training too."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _open_reward_model(model: str, revision: str | None, **options: Any) -> Any:
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that a language model has no score head is no news
    try:
        loaded = _open(AutoModelForSequenceClassification, model, revision, num_labels=1, **options)
    finally:
        logging.set_verbosity(level)
    if not any("SequenceClassification" in name for name in loaded.config.architectures or ()):
        torch.nn.init.zeros_(loaded.score.weight)
    return loaded


def _refusal(model: str, revision: str | None, error: Exception) -> str:
    at = f" at revision {revision}" if revision else ""
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if Path(model).is_dir():
        return f"model {model}: cannot be loaded ({reason}); it needs config, tokenizer and safetensors weights"
    if not is_here_or_hub_is(model):
        reason = "the hub cannot be reached, and its cache here does not hold it"
    return (
        f"model {model}{at}: neither a folder here nor a model that can be had ({reason}); "
        "check its name, or use nano, the embedded model"
    )


def pick_device(device: str, setting: str = "engine.device") -> torch.device:
    """auto -> CUDA, then MPS, then CPU. Raises EngineRefused for a device that is not here."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise EngineRefused(f"{setting}: {device} is not available here; use auto, cuda, mps or cpu") from error


def pick_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """The dtype of the weights. Raises EngineRefused for an unknown name."""
    if dtype in ("auto", "stored"):
        stored = getattr(config, "dtype", None) if dtype == "stored" or device.type == "cuda" else None
        return stored if isinstance(stored, torch.dtype) else torch.float32
    if dtype not in _DTYPES:
        raise EngineRefused(f"engine.dtype: {dtype} is unknown; use auto, float32, bfloat16 or float16")
    return _DTYPES[dtype]


def stored_dtype(model: str) -> torch.dtype:
    """What a model's weights are stored in, float32 if it does not say. Raises EngineRefused."""
    return pick_dtype("stored", torch.device("cpu"), load_config(model))


def fingerprint(config: Any, tokenizer: Any, *, dtype: torch.dtype) -> dict[str, str]:
    """Identity by content of what is not the weights: another one if a setting or a token changes."""
    settings = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    settings = json.loads(json.dumps(settings, default=str))
    return {
        "config": digest(settings),
        "tokenizer": digest([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template or ""]),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _weights(model: str, config: Any, revision: str | None) -> str:
    """The hub's commit of a hub model; of a folder, or where no commit is known, a hash of the files."""
    if (base := base_of(model)) != model:
        return digest([_weights(base, config, revision), adapter_digest(Path(model))])
    if Path(model).is_dir():
        _check_headers(model)
        return hash_weights(Path(model))
    if commit := getattr(config, "_commit_hash", None):
        return f"hub {commit}"
    return hash_weights(Path(str(cached_file(model, "config.json", revision=revision))).parent)


def _check_headers(model: str) -> None:
    """Raises EngineRefused for a file of weights that is cut: an engine of others might not say so in a line."""
    try:
        for path in Path(model).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                file.keys()
    except SafetensorError as error:
        raise EngineRefused(_refusal(model, None, error)) from error


def hash_weights(folder: Path) -> str:
    """sha256 over names and contents of a folder's safetensors files."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        part = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while block := file.read(_HASH_BYTES):
                part.update(block)
        total.update(f"{path.name} {part.hexdigest()}\n".encode())
    return total.hexdigest()
