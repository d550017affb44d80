"""Rotary positions in the cache: turn stored keys by a number of positions.

Rotary embeddings make attention logits depend on the difference of positions only, so a key that was rotated to
position p can be used at position p + n by one more rotation. Keys stay stored as the model rotated them and are
turned when they are read, in float32: nothing is lost by turning back and forth, and a shift of 0 changes no bit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvrepro import kernels


@dataclass(frozen=True)
class Rotation:
    """Rotation by the model's own frequencies.

    Attributes:
        inv_freq: `[d_rot / 2]` float32, radians per position; the first `d_rot` of a head's dimensions are rotated,
            dimension j together with j + d_rot / 2.
    """

    inv_freq: Tensor
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def frequencies(self, device: torch.device) -> Tensor:
        """`inv_freq` on a device, copied there once: a model's layers may lie elsewhere than its rotary embedding."""
        if device not in self._copies:
            self._copies[device] = self.inv_freq.to(device)
        return self._copies[device]

    def covers(self, head_dim: int) -> bool:
        """Whether all dimensions of a head are rotated, as the kernels take it."""
        return 2 * self.inv_freq.numel() == head_dim

    def rotate(self, keys: Tensor, shift: Tensor) -> Tensor:
        """Move keys by `shift` positions.

        Args:
            keys: `[B, H, S, d]`.
            shift: `[B, H, S]`, positions; may be negative.

        Returns:
            `[B, H, S, d]` in the dtype of `keys`.
        """
        if self.covers(keys.shape[-1]) and kernels.covers(keys):
            from kvrepro.kernels import rotation

            return rotation.rotate(keys, shift, self.frequencies(keys.device))
        wide = torch.promote_types(keys.dtype, torch.float32)
        angle = shift.to(wide).unsqueeze(-1) * self.frequencies(keys.device).to(wide)  # [B, H, S, d_rot / 2]
        half = angle.shape[-1]
        a, b, rest = keys.to(wide).split([half, half, keys.shape[-1] - 2 * half], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(keys.dtype)


def find_rotation(model: PreTrainedModel, layer_type: str) -> Rotation:
    """Read the rotary frequencies of the model's layers of one type, and check them against the model's own code.

    Args:
        model: a decoder.
        layer_type: `"full_attention"` for the layers that are compressed.

    Raises:
        ValueError: the model has no rotary embedding, or rotates in a way that this module does not reproduce.
    """
    module = next((m for m in model.modules() if _frequencies(m, layer_type) is not None), None)
    if module is None:
        raise ValueError("this model has no rotary embedding; use positions='original'")
    rotation = Rotation(_frequencies(module, layer_type).detach().float())
    if not _agrees(model, module, layer_type, rotation):
        raise ValueError(
            f"{type(model).__name__} rotates its keys in a way that cannot be undone here; use positions='original'"
        )
    return rotation


def _frequencies(module: nn.Module, layer_type: str) -> Tensor | None:
    """The buffer of rotary frequencies that `module` holds for `layer_type`, if it holds one."""
    buffers = dict(module.named_buffers(recurse=False))
    return buffers.get(f"{layer_type}_inv_freq", buffers.get("inv_freq"))


def _agrees(model: PreTrainedModel, module: nn.Module, layer_type: str, rotation: Rotation) -> bool:
    """Whether rotating by 7 positions here equals the model's own rotation at position 7."""
    apply = next(
        (f for m in model.modules() if (f := vars(sys.modules[type(m).__module__]).get("apply_rotary_pos_emb"))), None
    )
    if apply is None:
        return False
    inv_freq = _frequencies(module, layer_type)
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    x = torch.randn(1, 1, 2, head_dim, generator=generator).to(inv_freq.device)
    x[:, :, 1] = x[:, :, 0]
    place = torch.tensor([[0, 7]], device=inv_freq.device)
    typed = f"{layer_type}_inv_freq" in dict(module.named_buffers(recurse=False))
    cos, sin = module(x, place, layer_type) if typed else module(x, place)
    turned, _ = apply(x, x, cos, sin)
    shift = torch.full((1, 1, 1), 7, device=inv_freq.device)
    return torch.allclose(rotation.rotate(turned[:, :, :1], shift), turned[:, :, 1:], atol=1e-4, rtol=1e-3)
