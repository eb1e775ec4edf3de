"""Small random models of Hugging Face's families, for the tests of several rooms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

SMALL: dict[str, dict[str, Any]] = {
    "Llama": {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "GPT2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
}
SMALL["Qwen2"] = SMALL["Llama"]


def small(family: str, *, tied: bool = False, vocab_size: int = 11, **options: Any) -> nn.Module:
    """Build a causal language model whose weights are large enough for its predictions to differ.

    Skips the test where transformers is not installed. The model is in evaluation mode and in single precision, and the
    same in every call with the same arguments; the global generator is left alone.
    """
    transformers = pytest.importorskip("transformers")
    settings = {"initializer_range": 0.5, "vocab_size": vocab_size, "tie_word_embeddings": tied}
    config = getattr(transformers, f"{family}Config")(**{**SMALL[family], **settings, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()
