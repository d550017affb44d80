"""What went through each compressed layer, so that an oracle can be fed the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvrepro.cache import CompressedCache, CompressedLayer


@dataclass
class Pass:
    """One forward through one layer."""

    queries: Tensor  # [B, H_q, n, d], after RoPE
    keys: Tensor  # [B, H_kv, n, d], after RoPE: the new tokens' only
    values: Tensor
    output: Tensor  # [B, H_q, n, d]


@contextmanager
def recorded(cache: CompressedCache) -> Iterator[list[list[Pass]]]:
    """For each compressed layer the passes that happen inside the block."""
    passes: list[list[Pass]] = []
    for layer in cache.compressed:
        passes.append([])
        _listen(layer, passes[-1])
    try:
        yield passes
    finally:
        for layer in cache.compressed:
            del layer.update, layer.attend


def _listen(layer: CompressedLayer, into: list[Pass]) -> None:
    update, attend = layer.update, layer.attend
    arrived: list[tuple[Tensor, Tensor]] = []

    def hear_update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        arrived.append((keys.clone(), values.clone()))
        return update(keys, values, *args, **kwargs)

    def hear_attend(module: nn.Module, query: Tensor, *args: Any) -> Tensor:
        output = attend(module, query, *args)
        into.append(Pass(query.clone(), *arrived.pop(), output.clone()))
        return output

    layer.update, layer.attend = hear_update, hear_attend


def rotary_frequencies(model: PreTrainedModel) -> np.ndarray:
    """Radians per position of each rotated pair."""
    found = dict(model.named_buffers())
    names = ("model.rotary_emb.full_attention_inv_freq", "model.rotary_emb.inv_freq")
    return next(found[name] for name in names if name in found).float().double().numpy()


def oracle_for(layer: CompressedLayer, model: PreTrainedModel, name: str, options: dict[str, Any]) -> oracles.Oracle:
    """The oracle of one layer, with its own idea of every default that `options` leaves open."""
    config = model.config.get_text_config(decoder=True)
    return oracles.make_oracle(
        name,
        layer.budget,
        layer.share,
        options,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        inv_freq=rotary_frequencies(model),
        scale=8**-0.5,
        softcap=getattr(config, "attn_logit_softcapping", None),
        layer=layer.layer,
    )


def assert_same_slots(layer: CompressedLayer, oracle: oracles.Oracle, row: int = 0, atol: float = 1e-5) -> None:
    """Positions, cardinalities, keys and values of every KV head equal the oracle's."""
    for h, slots in enumerate(oracle.heads):
        held = layer.cardinality[row, h] > 0
        assert layer.positions[row, h][held].tolist() == [slot.position for slot in slots]
        assert layer.cardinality[row, h][held].tolist() == [slot.cardinality for slot in slots]
        keys = torch.from_numpy(np.array([slot.key for slot in slots]))
        values = torch.from_numpy(np.array([oracle.read_value(slot) for slot in slots]))
        torch.testing.assert_close(layer.keys[row, h][held].double(), keys, atol=atol, rtol=atol)
        torch.testing.assert_close(layer.values[row, h][held].double(), values, atol=atol, rtol=atol)
