"""Small models with random weights, of the families the adapter is tested on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import kvrepro
from kvrepro.experiments import common

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
VOCABULARY = 97

# Gemma: a sliding layer, which stays as it is, between full layers, which are compressed; Gemma 2 caps its logits.
_MIXED = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
}
_CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": functools.partial(Gemma2Config, **_MIXED, attn_logit_softcapping=2.0),
    "gemma3": functools.partial(Gemma3TextConfig, **_MIXED),
    # Not promised, but the adapter must either serve them or say why not.
    "phi3": functools.partial(Phi3Config, partial_rotary_factor=0.5),
    "cohere": CohereConfig,
    "qwen3_moe": functools.partial(Qwen3MoeConfig, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
}


def tiny_model(
    family: str = "llama",
    *,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A model of a few thousand weights; large enough ones that attention is far from uniform."""
    if family == "mistral":
        config = {"sliding_window": None, **config}  # as in version 0.2 and later
    settings = _CONFIGS[family](
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        **config,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings)
    return model.to(dtype).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, never the padding id."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def measure_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let experiments measure on a tiny model and random tokens, and raise what goes wrong."""
    model = kvrepro.prepare(tiny_model(dtype=torch.float32))
    monkeypatch.setenv("KVREPRO_STRICT", "1")
    monkeypatch.setattr(common, "_loaded", lambda *_: model)
    monkeypatch.setattr(common, "_tokenizer", lambda *_: None)
    monkeypatch.setattr(common.Bench, "windows", lambda _, text, length, n: tokens(n, length, seed=len(text)))
