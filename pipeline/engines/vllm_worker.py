"""What vLLM's workers can do besides their own, in their processes."""

from __future__ import annotations

from typing import Any


class ReadsAgain:
    """vLLM joins it to its worker class, by the engine argument `worker_extension_cls`."""

    reload_weights: Any
    get_model: Any

    def read_weights_again(self) -> None:
        """Those that the model's folder holds now. Prefixes that were computed stay in the cache."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        self.reload_weights()
        for module in self.get_model().modules():
            if isinstance(module, ParallelLMHead):
                # A head tied to the embeddings is none of the weights that are read, and on a CPU computes with a
                # packed copy, which vLLM 0.32 leaves as it was.
                module.quant_method.process_weights_after_loading(module)
