"""Low-rank adapters beside frozen weights, through peft: Hu et al. 2021 (arXiv 2106.09685).

They are put into the model in place, so that everything else goes on with the model it knows; what is trained is what
still asks for a gradient. The adapters start at zero effect and have no dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.config.settings import LoraSettings
from pipeline.errors import UsageError
from pipeline.lm.adapter import merge
from pipeline.lm.load import Head, load

ADAPTER = "adapter"
"""Its folder, inside that of the merged model."""


def attach(model: Any, settings: LoraSettings, *, head: Head, seed: int) -> Any:
    """Freezes the model and puts adapters in, in fp32. A reward model's head stays whole and is trained as well.

    Returns peft's view of the model, which can save the adapter. Raises UsageError for modules that are not there.
    """
    from peft import LoraConfig, get_peft_model

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="SEQ_CLS" if head == "score" else "CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora.target_modules: {str(error).splitlines()[0][:200]}; use all-linear") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model as it was before `attach`; nothing if it has no adapters."""
    layers = [module for module in model.modules() if hasattr(module, "adapter_layer_names")]  # as peft's have
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(adapted: Any, model: Any, folder: Path) -> None:
    """As peft and vLLM load it. adapted: what `attach` gave. model: the one that has the weights now."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {f"base_model.model.{name}": parameter.detach() for name, parameter in trained.items()}
    adapted.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's, with nothing filled in; the merged model's card says it all


def merged(start: str, folder: Path, *, like: Any) -> Any:
    """The start read again, in the dtype it is stored in, with the folder's adapter in its weights, on the CPU.

    like: the model that was trained.
    """
    head: Head = "score" if like.get_output_embeddings() is None else "language"
    model = merge(load(start, dtype="stored", device="cpu", head=head).model, folder)
    model.config.pad_token_id = like.config.pad_token_id
    return model
