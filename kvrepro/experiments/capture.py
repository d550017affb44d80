"""Record queries, keys, values and attention outputs of a model's layers during one forward.

A recording attention function takes the place of the model's own for the time of the forward, so the tensors
are the ones attention really gets (rotary positions applied), for every family that uses transformers'
attention interface.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "kvrepro_capture"


@dataclass(frozen=True)
class LayerCapture:
    """Tensors of one layer's attention, H_q query heads and H_kv KV heads of dimension d, L tokens.

    Attributes:
        queries: post-RoPE queries, [B, H_q, L, d].
        keys: post-RoPE keys, [B, H_kv, L, d].
        values: values, [B, H_kv, L, d].
        outputs: attention outputs before the output projection, [B, H_q, L, d]; a leaf of the autograd graph when
            the capture was made with `grad=True`.
        scale: factor on the logits, scale * q.k.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor
    scale: float


@dataclass
class _Recorder:
    """Where the recording attention function puts what it sees."""

    layers: Collection[int] | None
    grad: bool
    seen: dict[int, LayerCapture] = field(default_factory=dict)


_recorder: ContextVar[_Recorder | None] = ContextVar("kvrepro_capture_recorder", default=None)


def _recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """Run SDPA and hand its inputs and output to the active recorder (signature: transformers' interface)."""
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # [B, L, H_q, d]
    recorder = _recorder.get()
    layer = int(module.layer_idx)
    if recorder is not None and (recorder.layers is None or layer in recorder.layers):
        heads_first = output.detach().transpose(1, 2).contiguous()  # [B, H_q, L, d]
        if recorder.grad:
            # A leaf in the middle of the graph: backward stops here and leaves dL/do in its grad.
            heads_first.requires_grad_()
            output = heads_first.transpose(1, 2)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        recorder.seen[layer] = LayerCapture(query.detach(), key.detach(), value.detach(), heads_first, float(scale))
    return output, None


AttentionInterface.register(_NAME, _recording_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextmanager
def recording(
    model: PreTrainedModel, layers: Collection[int] | None = None, *, grad: bool = False
) -> Iterator[dict[int, LayerCapture]]:
    """Record every forward of `model` inside the block.

    Args:
        model: a causal language model that uses transformers' attention interface.
        layers: indices of the layers to record; all when `None`.
        grad: make the recorded outputs leaves of the autograd graph, so that the loss can be differentiated by them.
            Earlier layers then take no part in the backward pass. Record one layer only.

    Yields:
        Layer index to `LayerCapture` of the last forward.

    Raises:
        ValueError: when a layer index does not exist or `grad` is asked for more than one layer.
    """
    count = model.config.get_text_config().num_hidden_layers
    unknown = sorted(set(layers or ()) - set(range(count)))
    if unknown:
        raise ValueError(f"the model has layers 0 … {count - 1}, not {unknown}; choose among those")
    if grad and (layers is None or len(layers) != 1):
        raise ValueError("grad=True records one layer: a second leaf would cut the first one off; pass layers=[i]")
    recorder = _Recorder(layers, grad)
    before = model.config._attn_implementation
    token = _recorder.set(recorder)
    model.set_attn_implementation(_NAME)
    try:
        yield recorder.seen
    finally:
        model.set_attn_implementation(before)
        _recorder.reset(token)


@torch.no_grad()
def capture_qkv(
    model: PreTrainedModel, input_ids: Tensor, layers: Collection[int] | None = None
) -> dict[int, LayerCapture]:
    """Post-RoPE queries, keys, values and attention outputs of one forward without a cache.

    Args:
        model: a causal language model that uses transformers' attention interface.
        input_ids: token ids, [B, L], on the model's device.
        layers: indices of the layers to record; all when `None` (memory: (H_q·2 + H_kv·2)·d floats a token and layer).

    Returns:
        Layer index to `LayerCapture`, in layer order.

    Raises:
        ValueError: when a layer index does not exist.
    """
    with recording(model, layers) as seen:
        model.base_model(input_ids=input_ids, use_cache=False)  # without the head: no [L, vocabulary] logits
    return dict(sorted(seen.items()))
