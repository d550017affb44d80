"""AsymKV (2025): merge neighbouring keys by a diagonal Fisher estimate, keep values whole. KVSlimmer's baseline."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrepro.attention import Observation, Step
from kvrepro.methods.base import option
from kvrepro.methods.pairs import Choice, PairMerging
from kvrepro.slots import Slots


@dataclass(frozen=True)
class AsymKV(PairMerging):
    """Merge the least attended pairs of neighbours; each dimension of the key weighted by its squared loss gradient.

    The gradient is that of the next-token loss of the chunk that is read, by the cached keys before rotary
    embedding. It needs a backward pass, which `kvrepro.prefill` runs. Where none was run (plain `generate`, decoding)
    the gradient's square is estimated from the forward pass alone (ours, see `forward_fisher`), and a warning says so.
    """

    name: ClassVar[str] = "asymkv"
    title: ClassVar[str] = "AsymKV"
    paper: ClassVar[str] = "Homogeneous Keys, Heterogeneous Values: Exploiting Local KV Cache Asymmetry (2025)"
    url: ClassVar[str] = "https://arxiv.org/abs/2506.05410"

    fisher: str = option(
        "loss", "code: squared gradient of the chunk's loss; 'forward' (ours) needs no gradient", ("loss", "forward")
    )

    @property
    def replayable(self) -> bool:
        """Not where the loss's gradient is asked for."""
        return self.fisher != "loss"

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """As pairs merge; only the warning is said on the host."""
        return super().steady(budget, arrived)

    def leaves(self, budget: int) -> int | None:
        """See `PairMerging.leaves`; stated here because `compress` is."""
        return super().leaves(budget)

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Merge pairs in rounds; a merged slot carries the sum of its members' squared gradients."""
        if self.fisher == "loss" and step.gradients is None:
            warnings.warn(
                "asymkv: no loss gradient was taken for this pass, its square is estimated from the forward pass; read "
                "prompts with kvrepro.prefill, or choose fisher='forward' to say that you mean it",
                stacklevel=2,
            )
        found = step.gradients
        squares = forward_fisher(slots, self.judges(step)) if found is None else found.square()
        slots = dataclasses.replace(slots, stats={**slots.stats, "fisher": squares})
        slots = super().compress(slots, budget, step)
        return dataclasses.replace(slots, stats={n: x for n, x in slots.stats.items() if n != "fisher"})

    def weigh(self, slots: Slots, step: Step, seen: Observation, choice: Choice) -> Tensor:
        """k* = (g_i^2 k_i + g_j^2 k_j) / (g_i^2 + g_j^2) in each dimension; by cardinality where both are 0."""
        left, right = slots.stats["fisher"][:, :, :-1], slots.stats["fisher"][:, :, 1:]
        total = left + right
        tokens = slots.cardinality.to(total.dtype).unsqueeze(-1)
        plain = tokens[:, :, :-1] / (tokens[:, :, :-1] + tokens[:, :, 1:]).clamp_min(1.0)
        known = total > torch.finfo(total.dtype).tiny
        return torch.where(known, left / total.clamp_min(torch.finfo(total.dtype).tiny), plain)


def forward_fisher(slots: Slots, step: Step) -> Tensor:
    """An estimate of the squared loss gradient by each key, from the forward pass alone (ours).

    dL/dk_i = sum_q alpha_i (E.(v_i - o)) q / sqrt(d). With E unknown and the same in all directions, the expected
    square is proportional to sum_q alpha_i^2 |v_i - o|^2 q^2. Before rotary embedding the two dimensions of a rotated
    pair trade places with the distance: their mean stands for both.

    Returns:
        `[B, H_kv, S, d]` float32 or float64, up to a factor shared by all slots.
    """
    wide = torch.promote_types(slots.keys.dtype, torch.float32)
    values = slots.values.to(wide)
    half = step.queries.shape[-1] // 2
    squares = step.queries.to(wide).square()
    paired = (squares[..., :half] + squares[..., half : 2 * half]) / 2
    squares = torch.cat([paired, paired, squares[..., 2 * half :]], dim=-1)
    total = torch.zeros_like(slots.keys, dtype=wide)
    for part, p in step.blocks(slots):
        distance = squared_distance(p, values)
        weight = (p.square() * distance).flatten(2, 3)  # [B, H, G q, S]
        total = total + weight.transpose(2, 3) @ squares[:, :, :, part].flatten(2, 3)
    return total


def squared_distance(p: Tensor, values: Tensor) -> Tensor:
    """`[B, H, G, q, S]`: |v_i - o|^2 for each query's output o = sum p v; `values` `[B, H, S, d]`."""
    flat = p.flatten(2, 3)
    out = flat @ values  # [B, H, G q, d]
    cross = out @ values.transpose(2, 3)
    distance = values.square().sum(-1).unsqueeze(2) - 2 * cross + out.square().sum(-1, keepdim=True)
    return distance.clamp_min(0.0).view_as(p)
