"""KVSlimmer (Liu et al., 2026): merge neighbouring keys by second derivatives in closed form, forward pass only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrepro.attention import Observation, Step
from kvrepro.methods.pairs import Choice, PairMerging
from kvrepro.slots import Slots, rank


@dataclass(frozen=True)
class KVSlimmer(PairMerging):
    """AsymKV's cache and choice of pairs; keys weighted by the norms of the output's second derivatives.

    `variant="paper"` forms the norms for each query of the pass and sums them (ours: the paper states one query).
    `variant="released"` follows the code: L1 norms of averaged attention, sums of values where the formula has means,
    a running mean over chunks, cardinalities that do not protect merged slots.
    """

    name: ClassVar[str] = "kvslimmer"
    title: ClassVar[str] = "KVSlimmer"
    paper: ClassVar[str] = (
        "KVSlimmer: Theoretical Insights and Practical Optimizations for Asymmetric KV Merging (2026)"
    )
    url: ClassVar[str] = "https://arxiv.org/abs/2603.00907"

    @property
    def statistics(self) -> tuple[str, ...]:
        """The released code keeps its running mean at every pass, so it needs the attention mass of each."""
        return ("mass",) if self.variant == "released" else ()

    @property
    def accumulates(self) -> tuple[str, ...]:
        """Side vectors of the released code: mean attention of the last pass, running mean of h."""
        return ("alpha", "h") if self.variant == "released" else ()

    @property
    def counts_passes(self) -> bool:
        """The released code's running mean weighs passes."""
        return self.variant == "released"

    @property
    def sums(self) -> bool:
        """The released code keeps a running mean; the paper's formulas need nothing of a pass."""
        return self.variant == "paper"

    def initial_state(self, slots: Slots) -> dict[str, Tensor]:
        """No pass seen yet."""
        if self.variant == "paper":
            return {}
        return {"passes": slots.positions.new_zeros(slots.positions.shape[:2], dtype=torch.float32)}

    @property
    def by_cardinality(self) -> bool:
        """The released code collapses the pair's cardinality to one number, which changes no order."""
        return self.variant == "paper"

    def block_of(self, budget: int) -> int:
        """The released code's running mean changes at every pass: one slot at a time unless set."""
        return 1 if self.variant == "released" and self.block is None else super().block_of(budget)

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """The running mean of the released code is kept on the device."""
        return super().steady(budget, arrived)

    def leaves(self, budget: int) -> int | None:
        """See `PairMerging.leaves`; stated here because `accumulate` is."""
        return super().leaves(budget)

    def accumulate(self, slots: Slots, found: dict[str, Tensor], step: Step) -> Slots:
        """The released code's running mean of h = alpha (1 - 2 alpha) |v - o|_1 over passes (chunks).

        As in the code, pass t weighs 1 / max(1, t - 1), counted for the layer: the second pass forgets the first.
        Tokens of this pass have no past and take h as it is.
        """
        if self.variant == "paper":
            return slots
        mass = found["mass"].mean(dim=2).masked_fill(~slots.valid, 0.0)  # alpha times cardinality, over the queries
        mass = mass.masked_fill(rank(slots) < self.sinks_of(step.budget), 0.0)
        alpha = mass / mass.sum(dim=2, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        now = alpha * (1 - 2 * alpha) * _mean_distance(slots, alpha)
        passes = slots.state.get("passes", torch.zeros_like(mass[..., 0]))
        asked = (step.query_positions >= 0).any(dim=1, keepdim=True).to(passes.dtype)  # [B, 1]: padding is no pass
        weight = 1.0 / passes.clamp_min(1.0).unsqueeze(-1)
        first = torch.where(step.query_positions < 0, torch.iinfo(torch.int32).max, step.query_positions).amin(dim=1)
        fresh = slots.positions >= first[:, None, None]
        h = torch.where(fresh, now, weight * now + (1 - weight) * slots.stats["h"])
        return dataclasses.replace(
            slots, stats={"alpha": alpha.float(), "h": h.float()}, state={"passes": passes + asked}
        )

    def weigh(self, slots: Slots, step: Step, seen: Observation, choice: Choice) -> Tensor:
        """`[B, H_kv, S - 1, 1]`: the share of the left key by the closed form."""
        if self.variant == "released":
            alpha, single = slots.stats["alpha"], slots.stats["h"]
            distance = _mean_distance(slots, alpha)
            cross = alpha[..., :-1] * alpha[..., 1:] * (distance[..., :-1] + distance[..., 1:])
        elif seen.view is not None:
            return _share_of_chosen(slots, step, seen, choice).unsqueeze(-1)
        else:
            alpha = seen.mass
            single, cross = curvature_norms(slots, step, seen)
        return merge_share(single[..., :-1], single[..., 1:], cross, alpha[..., :-1], alpha[..., 1:]).unsqueeze(-1)

    def merge_stats(self, slots: Slots, share: Tensor) -> dict[str, Tensor]:
        """The released code's h* = a^2 h_m + b^2 h_{m+1}; attention adds up."""
        merged = super().merge_stats(slots, share)
        if self.variant == "released":
            a = share.squeeze(-1)
            h = slots.stats["h"]
            merged["h"] = a.square() * h[:, :, :-1] + (1 - a).square() * h[:, :, 1:]
        return merged


def second_derivatives(alpha: Tensor, values: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Second derivatives of the attention output by the logits of neighbours m and m + 1 (paper; checked).

    c11 = a_m (1 - 2 a_m) (v_m - o), c22 the same for m + 1, c12 = -a_m a_{m+1} (v_m + v_{m+1} - 2 o).

    Args:
        alpha: `[..., S]` attention probabilities of one query.
        values: `[..., S, d]`.
        output: `[..., d]`, o = sum alpha v.

    Returns:
        c11, c22, c12, each `[..., S - 1, d]`.
    """
    away = values - output.unsqueeze(-2)
    single = (alpha * (1 - 2 * alpha)).unsqueeze(-1) * away
    left, right = alpha[..., :-1].unsqueeze(-1), alpha[..., 1:].unsqueeze(-1)
    cross = -left * right * (away[..., :-1, :] + away[..., 1:, :])
    return single[..., :-1, :], single[..., 1:, :], cross


def merge_share(n11: Tensor, n22: Tensor, n12: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The share of the left key, (n11 - n12) / (n11 - 2 n12 + n22) (paper), kept inside [0, 1] (ours).

    When attention nears 1/2 or the denominator nears 0, the paper's weights leave [0, 1]. They are clamped; where the
    denominator is not positive, the mean weighted by attention takes over.

    Args:
        n11: norms of c11, any shape.
        n22: norms of c22.
        n12: norms of c12.
        left: attention to the left slot.
        right: attention to the right slot.

    Returns:
        The share, of the same shape.
    """
    total = n11 - 2 * n12 + n22
    known = total > 1e-6 * (n11 + n22)
    by_attention = torch.where(left + right > 0, left / (left + right).clamp_min(torch.finfo(left.dtype).tiny), 0.5)
    share = (n11 - n12) / torch.where(known, total, torch.ones_like(total))
    return torch.where(known, share.clamp(0.0, 1.0), by_attention.to(share.dtype))


def _share_of_chosen(slots: Slots, step: Step, seen: Observation, choice: Choice) -> Tensor:
    """`[B, H_kv, S - 1]`: the left key's share in the chosen pairs, by kernel; elsewhere whatever was there."""
    from kvrepro.kernels import pairs

    view = seen.view
    if view.source is not slots.keys:  # some are merged by now
        view = dataclasses.replace(
            view, keys=step.read_keys(slots), values=slots.values, bias=step.bias(slots), source=slots.keys
        )
    return pairs.shares(view, slots.positions, step.query_positions, seen.mass, choice)


def curvature_norms(slots: Slots, step: Step, seen: Observation) -> tuple[Tensor, Tensor]:
    """L2 norms of the second derivatives, summed over the pass's queries and the group's heads.

    Norms come from inner products, |v_m + v_{m+1} - 2 o|^2 = |u|^2 - 4 u.o + 4 |o|^2, so no tensor of size
    queries x slots x d is formed.

    Args:
        slots: `S` slots a head, some merged since the queries saw them perhaps.
        step: the queries.
        seen: their output and log-sum-exp.

    Returns:
        |c11| for every slot `[B, H_kv, S]` (a pair's |c22| is its right slot's), and |c12| for every pair
        `[B, H_kv, S - 1]`.
    """
    wide = torch.promote_types(slots.values.dtype, torch.float32)
    v = slots.values.to(wide)
    u = v[:, :, :-1] + v[:, :, 1:]
    vv, uu = v.square().sum(-1)[:, :, None], u.square().sum(-1)[:, :, None]  # [B, H, 1, S]
    single, cross = 0.0, 0.0
    for part, p in step.blocks(slots, seen.lse):
        p = p.flatten(2, 3)  # [B, H, G q, S]
        o = seen.output[:, :, :, part].flatten(2, 3).to(wide)
        oo, vo = o.square().sum(-1, keepdim=True), o @ v.transpose(2, 3)
        uo = vo[..., :-1] + vo[..., 1:]
        away = (vv - 2 * vo + oo).clamp_min(0.0).sqrt()
        pair = (uu - 4 * uo + 4 * oo).clamp_min(0.0).sqrt()
        single = single + (p * (1 - 2 * p).abs() * away).sum(dim=2)
        cross = cross + (p[..., :-1] * p[..., 1:] * pair).sum(dim=2)
    return single, cross


def _mean_distance(slots: Slots, alpha: Tensor) -> Tensor:
    """`[B, H_kv, S]`: |v - o|_1 with o = sum alpha v, where v is the sum over a slot's tokens (released code)."""
    values = slots.values.to(alpha.dtype) * slots.cardinality.unsqueeze(-1)
    output = (alpha.unsqueeze(-1) * values).sum(dim=2, keepdim=True)
    return (values - output).abs().sum(dim=-1)
