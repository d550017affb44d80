"""The one place that knows how transformers calls attention.

One attention function and one mask function are registered under the name `"kvrepro"`. Model families that use
transformers' attention interface then hand over post-RoPE queries and whatever the cache's `update` returned; a
compressed layer is recognised by the key tensor it returned. No model file is forked, nothing is patched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The name under which transformers finds the attention and mask functions.
NAME = "kvrepro"
_TAG = "_kvrepro_layer"
_STEP = "_kvrepro_step"

#: What attends to one new token a row: (query, key, value, scale, softcap) -> output, see `redirected`.
Attend = Callable[[Tensor, Tensor, Tensor, float, float | None], Tensor]
_attending: dict[nn.Module, Attend] = {}
_turns: list[Iterator[Attend]] = []
_unmasked: list[bool] = []


class AttendingLayer(Protocol):
    """A cache layer that computes attention itself."""

    def attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention output `[B, H_q, n, d]` of queries `[B, H_q, n, d]`."""
        ...


def tag(key: Tensor, layer: AttendingLayer) -> Tensor:
    """Mark the key tensor that a layer's `update` returns: what transformers passes on is all that connects them."""
    setattr(key, _TAG, layer)
    return key


@torch.library.custom_op("kvrepro::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> Tensor:
    """Hand a step to what attends for the layer whose turn it is.

    One operator, so that a compiler need not look inside, and the same for all layers, so that what is compiled for one
    serves them all.
    """
    return next(_turns[0])(query, key, value, scale, softcap or None)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float) -> Tensor:
    """The output's shape, for the compiler."""
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@contextmanager
def redirected(handlers: Mapping[nn.Module, Attend]) -> Iterator[None]:
    """Let attention modules hand their queries, keys and values `[B, H, 1, d]` to `handlers`, no cache between.

    Inside, the model runs once, its attention modules in the order of `handlers`.
    """
    _attending.update(handlers)
    _turns.append(iter(handlers.values()))
    for module in handlers:
        setattr(module, _STEP, True)
    try:
        yield
    finally:
        _attending.clear()
        _turns.clear()
        for module in handlers:
            delattr(module, _STEP)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers: a compressed layer attends itself, everything else takes PyTorch's kernels.

    Args:
        module: the model's attention layer.
        query: `[B, H_q, n, d]`, post-RoPE.
        key: `[B, H_kv, S, d]` from the cache.
        value: `[B, H_kv, S, d_v]` from the cache.
        attention_mask: what `mask_function` made.
        scaling: factor on the logits; 1 / sqrt(d) unless given.
        dropout: attention dropout; must be 0 with a compressed cache.
        softcap: cap on the logits.
        **kwargs: whatever else the model passes; attention sinks (`s_aux`) are not supported.

    Returns:
        Output `[B, n, H_q, d_v]`, and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            "kvrepro does not support learned attention sinks (s_aux); load the model with another attention"
        )
    if getattr(module, _STEP, False):
        if torch.compiler.is_compiling():
            out = torch.ops.kvrepro.attend(query, key, value, scale, softcap or 0.0)
        else:
            out = _attending[module](query, key, value, scale, softcap)
        return out.transpose(1, 2).contiguous(), None
    layer = getattr(key, _TAG, None)
    if layer is not None:
        if dropout:
            raise ValueError("a compressed cache is for inference; call model.eval() first")
        return layer.attend(module, query, attention_mask, scale, softcap).transpose(1, 2).contiguous(), None
    if softcap is not None:
        return _capped(query, key, value, attention_mask, scale, softcap), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention with capped logits over a plain cache, which PyTorch's kernels do not offer; `[B, n, H_q, d_v]`."""
    b, hq, n, d = query.shape
    h, s = key.shape[1], key.shape[2]
    if mask is None:
        mask = torch.ones(n, s, dtype=torch.bool, device=query.device).tril(s - n)
    grouped = query.view(b, h, hq // h, n, d).float()
    logits = softcap * torch.tanh((grouped @ key.float().transpose(2, 3).unsqueeze(2)) * scale / softcap)
    p = torch.softmax(logits.masked_fill(~mask.view(-1, 1, 1, n, s) if mask.dim() == 4 else ~mask, -torch.inf), dim=-1)
    out = p.nan_to_num(0.0).to(value.dtype) @ value.unsqueeze(2)
    return out.view(b, hq, n, -1).transpose(1, 2).contiguous()


def mask_function(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask for transformers: SDPA's.

    A compressed layer says through `get_mask_sizes` that it has just the new tokens, so its mask is `[B, 1, n, n]` or
    None: padding among the new tokens, and nothing about slots, which know themselves whether they are empty.
    """
    return None if _unmasked else sdpa_mask(*args, **kwargs)


@contextmanager
def unmasked() -> Iterator[None]:
    """Inside, no mask is made: for text without padding read by compressed layers alone.

    Without this transformers makes one whenever a CUDA graph is captured, whether it says anything or not.
    """
    _unmasked.append(True)
    try:
        yield
    finally:
        _unmasked.pop()


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Ready a model that you loaded: route its attention through kvrepro. Plain caches keep working as before.

    Args:
        model: a decoder from transformers.

    Returns:
        The same model.

    Raises:
        ValueError: the model's family does not use transformers' attention interface, or takes no cache.
    """
    if not isinstance(model, PreTrainedModel) or not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, its cache cannot be compressed; "
            "use a family that does, such as Llama, Mistral, Qwen2, Qwen3 or Gemma 3"
        )
    cache_keyword(model)  # refuses a model that takes no cache
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_function)
    model.set_attn_implementation(NAME)
    return model


def cache_keyword(model: PreTrainedModel) -> str:
    """What a model calls its cache: `cache` since transformers 5.24, `past_key_values` before and in older model code.

    A keyword that a model does not know is ignored without an error, and the cache stays empty.

    Raises:
        ValueError: the model takes no cache by a name that is known here.
    """
    return _cache_keyword(type(model))


@functools.cache
def _cache_keyword(kind: type[PreTrainedModel]) -> str:
    """`cache_keyword` of a class of models."""
    known = inspect.signature(kind.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in known:
            return name
    raise ValueError(
        f"{kind.__name__} takes neither cache nor past_key_values, so that no cache reaches it; use a decoder, such as "
        "AutoModelForCausalLM loads"
    )


def cache_arguments(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """The keyword arguments with which a model reads tokens into a cache, for `model(input_ids, **arguments)`."""
    return {cache_keyword(model): cache, "use_cache": True}


def is_prepared(model: PreTrainedModel) -> bool:
    """Whether `prepare` has been called on the model."""
    return model.config.get_text_config(decoder=True)._attn_implementation == NAME
