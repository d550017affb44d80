"""Attention over slots: the output, and the exact statistics that the methods decide by.

On a GPU the output comes from fused kernels, which leave each query's log-sum-exp behind, and the statistics from one
more product of queries and keys (`kernels.prefill`). Elsewhere, the output comes from PyTorch's fused attention where
no statistic is asked for; where one is, the probabilities are formed in blocks of queries, used for both, and let go.
Either way, memory grows with the prompt, not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvrepro import kernels
from kvrepro.rope import Rotation
from kvrepro.slots import Slots

#: Probabilities held at once, in elements: what stays in a CPU's cache (4 MiB in float32), or fills a GPU.
BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True)
class Step:
    """One forward pass through one layer: the queries, and how they see the slots.

    Attributes:
        queries: `[B, H_kv, G, n, d]`, as the model rotated them, grouped by the KV head they share.
        query_positions: `[B, n]` int32, each query's index in its row's text; -1 for padding.
        scale: logits are `scale * q.k`.
        softcap: Gemma's cap c on logits, c tanh(logit / c), or None.
        positions: `"original"`, `"cache"` or `"cardinality"`: where a slot stands for a query (see `read_keys`).
        cardinality_bias: add log(cardinality) to a slot's logit, so that it weighs as much as its tokens.
        rotation: the model's rotary rotation, None where no method needs it.
        layer: index of the layer.
        layers: number of layers of the model.
        budget: slots a head of this layer may hold.
        window_queries: `[B, H_kv, G, w, d]`, the last w queries seen (this pass included) for methods with a window.
        window_positions: `[B, w]` int32, their positions.
        gradients: `[B, H_kv, S, d]`, the loss's gradient by each slot's unrotated key, where one was taken.
        view: what the kernels read when the pass attended, where they did the work.
        again: the pass that read the same tokens a second time, behind themselves, where there was one.
        behind: the queries are not the newest slots' own but stand behind all slots, and see them all.
        rooms: `[B, H_kv]` int32, the slots that each head may hold, where a method gave them different numbers.
        found: what the method noted of the pass when the layer had to wait for the others (`Method.waiting`).
        one_over: every head holds one slot more than it may, which is known without looking (`Method.leaves`).
    """

    queries: Tensor
    query_positions: Tensor
    scale: float
    softcap: float | None = None
    positions: str = "original"
    cardinality_bias: bool = False
    rotation: Rotation | None = None
    layer: int = 0
    layers: int = 1
    budget: int = 0
    window_queries: Tensor | None = None
    window_positions: Tensor | None = None
    gradients: Tensor | None = None
    view: View | None = None
    again: Step | None = None
    behind: bool = False
    rooms: Tensor | None = None
    found: Any = None
    one_over: bool = False

    def shift(self, slots: Slots) -> Tensor | None:
        """`[B, H_kv, S]`: by how many positions each slot is moved when it is read, None where none is.

        In-cache positions pack the slots right before the newest token, which stays where the model put it: only
        differences of positions matter. `"cache"` counts slots, `"cardinality"` the tokens they stand for.
        """
        if self.positions == "original" or slots.dense:
            return None
        if kernels.covers(slots.keys):
            from kvrepro.kernels import rotation

            return rotation.shift(slots.positions, slots.cardinality, by_tokens=self.positions == "cardinality")
        weight = slots.valid if self.positions == "cache" else slots.cardinality
        place = weight.cumsum(dim=2)  # inclusive, so that a merged slot stands where its last token does
        newest = slots.positions.amax(dim=2, keepdim=True)
        return (newest - (place[..., -1:] - place) - slots.positions).masked_fill(~slots.valid, 0)

    def read_keys(self, slots: Slots) -> Tensor:
        """`[B, H_kv, S, d]`: the keys at the positions where the queries see them."""
        shift = self.shift(slots)
        return slots.keys if shift is None else self.rotation.rotate(slots.keys, shift)

    def bias(self, slots: Slots) -> Tensor | None:
        """`[B, H_kv, S]` float, added to a slot's logits; None where all are 0.

        The slot's own bias (the side vector `"bias"`), log cardinality where the method asks for it, and -inf for an
        empty slot.
        """
        if not self.is_biased(slots):
            return None
        wide = torch.promote_types(slots.keys.dtype, torch.float32)
        own = None if slots.dense else slots.stats.get("bias")
        if self.cardinality_bias and not slots.dense:
            bias = slots.cardinality.to(wide).log()  # -inf where empty
            return bias if own is None else bias + own
        bias = torch.zeros_like(slots.positions, dtype=wide) if own is None else own.to(wide)
        return bias.masked_fill(~slots.valid, -torch.inf) if slots.ragged else bias

    def is_biased(self, slots: Slots) -> bool:
        """Whether any slot's logit may have something added to it, empty slots' -inf included."""
        return slots.ragged or (not slots.dense and (self.cardinality_bias or "bias" in slots.stats))

    def last(self, count: int) -> Step:
        """This pass as its last `count` queries see it."""
        if self.queries.shape[3] <= count:
            return self
        return replace(
            self,
            queries=self.queries[:, :, :, -count:],
            query_positions=self.query_positions[:, -count:],
            view=None if self.view is None else self.view.last(count),
        )

    def blocks(self, slots: Slots, lse: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Attention probabilities of this pass's queries over `slots`, a block of queries at a time.

        Args:
            slots: what the queries attend to.
            lse: `[B, H_kv, G, n]`, the log-sum-exp that the logits are normalised by; None takes their own.

        Yields:
            The slice of queries, and `[B, H_kv, G, q, S]` probabilities in float32 (or float64); rows of padding are 0.
        """
        for part, found in self.logits(slots):
            if lse is None:
                yield part, softmax(found)
            else:
                yield part, (found - lse[:, :, :, part, None]).exp()

    def logits(self, slots: Slots) -> Iterator[tuple[slice, Tensor]]:
        """Like `blocks`, before the softmax: `[B, H_kv, G, q, S]`, -inf where a query does not see a slot."""
        keys, bias = self.read_keys(slots), self.bias(slots)
        b, h, g, n, _ = self.queries.shape
        rows = max(1, BLOCK.get(self.queries.device.type, BLOCK["cpu"]) // max(1, b * h * g * slots.size))
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            yield (
                part,
                causal_logits(
                    self.queries[:, :, :, part],
                    self.query_positions[:, part],
                    keys,
                    slots.positions,
                    bias,
                    self.scale,
                    self.softcap,
                ),
            )


def causal_logits(
    queries: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    key_positions: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Logits of causal attention by position, written out.

    Args:
        queries: `[B, H, G, n, d]`.
        query_positions: `[B, n]`; a query sees the slots at or before its position; -1 sees none.
        keys: `[B, H, S, d]`.
        key_positions: `[B, H, S]`.
        bias: `[B, H, S]` added to the logits, or None.
        scale: factor on the logits.
        softcap: cap on the logits, or None.

    Returns:
        `[B, H, G, n, S]` in float32, or float64 for float64 input; -inf where a query does not see a slot.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    b, h, g, n, d = queries.shape
    logits = (queries.reshape(b, h, g * n, d).to(wide) @ keys.to(wide).transpose(2, 3)).view(b, h, g, n, -1) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[:, :, None, None, :]
    hidden = (key_positions[:, :, None, :] > query_positions[:, None, :, None]) | (key_positions < 0)[:, :, None, :]
    return logits.masked_fill(hidden.unsqueeze(2), -torch.inf)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; a row that sees nothing, all -inf, has zeros."""
    return torch.softmax(logits, dim=-1).nan_to_num(0.0)


def attend(step: Step, slots: Slots, statistics: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention output of one forward pass, with the statistics asked for.

    Args:
        step: the queries.
        slots: what they attend to, this pass's own tokens last.
        statistics: any of `"mass"` (column sums over this pass's queries) and `"last"` (the newest query's row).

    Returns:
        Output `[B, H_kv, G, n, d_v]`, and the statistics, each `[B, H_kv, G, S]` float32 or float64.
    """
    out, found, _ = look(step, slots, statistics)
    return out, found


def look(
    step: Step, slots: Slots, statistics: Sequence[str], keep: bool = False
) -> tuple[Tensor, dict[str, Tensor], View | None]:
    """`attend`, and what the kernels read where they did the work, so that `observe` need not attend again.

    With `keep` the kernels do it whether or not PyTorch's fused attention, which keeps no log-sum-exp, would suffice.
    """
    if kernels.covers(step.queries, slots.keys, slots.values) and (statistics or keep or not _is_plain(step, slots)):
        seen = view(step, slots)
        found = {name: seen.column_sums({"mass": 0, "last": seen.count - 1}[name]) for name in statistics}
        return seen.output.view(*step.queries.shape[:4], -1), found, seen
    out, found = _without_kernels(step, slots, statistics)
    return out, found, None


def _is_plain(step: Step, slots: Slots) -> bool:
    """Whether PyTorch's fused attention does what is asked: one query, or a prompt's own tokens, and no bias."""
    n = step.queries.shape[3]
    return not step.is_biased(slots) and step.softcap is None and n in (1, slots.size)


def _without_kernels(step: Step, slots: Slots, statistics: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """`attend` in PyTorch."""
    if not statistics:
        return _fused(step, slots), {}
    outputs, mass, last = [], 0.0, None
    for _, p in step.blocks(slots):
        b, h, g, q, s = p.shape
        mixed = p.reshape(b, h, g * q, s).to(slots.values.dtype) @ slots.values
        outputs.append(mixed.view(b, h, g, q, -1))
        mass = mass + p.detach().sum(dim=3)
        last = p[:, :, :, -1].detach()
    found = {"mass": mass, "last": last}
    return torch.cat(outputs, dim=3), {name: found[name] for name in statistics}


@dataclass(frozen=True)
class View:
    """What the kernels read of a pass over slots.

    Attributes:
        queries: `[B, H_q, n, d]`.
        keys: `[B, H_kv, S, d]`, at the positions where the queries see them.
        values: `[B, H_kv, S, d]`.
        bias: `[B, H_kv, S]`, or None.
        output: `[B, H_q, n, d]`, where it was asked for.
        lse: `[B, H_q, n]` float32, log-sum-exp; +inf for padding.
        scale: factor on the logits.
        softcap: cap on the logits, or None.
        source: the slots' keys as they are stored.
        past: slots that every query sees.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    output: Tensor | None
    lse: Tensor
    scale: float
    softcap: float | None
    source: Tensor
    past: int

    @property
    def count(self) -> int:
        """Number of queries."""
        return self.queries.shape[2]

    def last(self, count: int) -> View:
        """What the last `count` queries see."""
        return replace(
            self,
            queries=self.queries[:, :, -count:],
            output=None if self.output is None else self.output[:, :, -count:],
            lse=self.lse[:, :, -count:].contiguous(),
            past=self.past + self.count - count,
        )

    def column_sums(self, first: int = 0, power: int = 1) -> Tensor:
        """`[B, H_kv, G, S]` float32: attention to each slot, to that power, of the queries from `first` on, summed."""
        from kvrepro.kernels import prefill

        sums = prefill.column_sums(
            self.queries, self.keys, self.lse, self.bias, self.scale, self.softcap, first, self.past, power
        )  # [B, H_q, S]
        return sums.view(len(sums), self.keys.shape[1], -1, sums.shape[-1])


def view(step: Step, slots: Slots, *, output: bool = True) -> View:
    """Attend by kernels, or find the log-sum-exp alone. Only where `kernels.covers` the pass."""
    from kvrepro.kernels import prefill

    b, h, g, n, d = step.queries.shape
    queries = step.queries.reshape(b, h * g, n, d)
    keys, bias = step.read_keys(slots), step.bias(slots)
    past = slots.size if step.behind else slots.size - n
    plain = n > 1 and (step.behind or past == 0) and bias is None and step.softcap is None
    # Few queries would keep few processors busy: the kernel cuts the slots they see all of into parts.
    plain = plain and not (step.behind and prefill.splits(queries, slots.size) > 1)
    found = None
    if not output:
        lse = prefill.log_sum_exp(queries, keys, bias, step.scale, step.softcap, past)
    elif plain and _cudnn(queries, keys, slots.values, causal=not step.behind):
        found, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            queries, keys, slots.values, None, True, 0.0, not step.behind, scale=step.scale
        )[:2]
        lse = lse.view(b, h * g, n)
    else:
        found, lse = prefill.attend(queries, keys, slots.values, bias, step.scale, step.softcap, past)
    if slots.ragged or step.behind:
        lse = lse.masked_fill((step.query_positions < 0)[:, None], torch.inf)
    return View(queries, keys, slots.values, bias, found, lse, step.scale, step.softcap, slots.keys, past)


def _cudnn(queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> bool:
    """Whether cuDNN's attention, the fastest there is of a whole prompt or over all slots, can be used."""
    asked = torch.backends.cuda.SDPAParams(queries, keys, values, None, 0.0, causal, True)
    return torch.backends.cuda.can_use_cudnn_attention(asked)


@dataclass(frozen=True)
class Observation:
    """How a pass's queries see slots.

    Attributes:
        mass: `[B, H_kv, S]`, attention to each slot, or its power, summed over queries and group, where asked for.
        output: `[B, H_kv, G, n, d]`, what the queries get, where asked for; 0 for a query that sees nothing.
        lse: `[B, H_kv, G, n]`, their log-sum-exp; +inf for a query that sees nothing.
        view: what the kernels read, where they did the work, else None.
        last: `[B, H_kv, S]`, the last query's attention to each slot, summed over the group, where there is no view.
    """

    mass: Tensor | None
    output: Tensor | None
    lse: Tensor
    view: View | None = None
    last: Tensor | None = None

    def newest(self) -> Tensor:
        """`[B, H_kv, S]`, the last query's attention to each slot, summed over the group."""
        return self.last if self.view is None else self.view.column_sums(self.view.count - 1).sum(dim=2)


def observe(step: Step, slots: Slots, power: int | None = 1, *, output: bool = True) -> Observation:
    """Let a pass's queries attend to slots.

    Args:
        step: the queries.
        slots: what they attend to.
        power: `mass` sums attention to this power; None adds nothing up.
        output: say what the queries get; without, on a GPU, it takes half the time.

    Returns:
        What was asked for, and the log-sum-exp in any case.
    """
    if kernels.covers(step.queries, slots.keys, slots.values):
        known = step.view is not None and step.view.source is slots.keys
        seen = step.view if known else view(step, slots, output=output)
        shape = step.queries.shape[:4]
        lse, found = seen.lse.reshape(shape), None
        if output:
            found = seen.output.reshape(*shape, -1)
            if slots.ragged or step.behind:
                found = found.masked_fill(lse.isinf().unsqueeze(-1), 0.0)
        mass = None if power is None else seen.column_sums(power=power).sum(dim=2)
        return Observation(mass, found, lse, seen)
    mass, outputs, normals = None if power is None else 0.0, [], []
    for _, logits in step.logits(slots):
        lse = logits.logsumexp(dim=-1)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        p = (logits - lse.unsqueeze(-1)).exp()
        if power is not None:
            mass = mass + p.pow(power).sum(dim=(2, 3))
        if output:
            outputs.append(p @ slots.values.to(p.dtype).unsqueeze(2))
        normals.append(lse)
    found = torch.cat(outputs, dim=3) if output else None
    return Observation(mass, found, torch.cat(normals, dim=3), last=p[:, :, :, -1].sum(dim=2))


def _fused(step: Step, slots: Slots) -> Tensor:
    """Attention output without statistics; `[B, H_kv, G, n, d_v]`."""
    b, h, g, n, _ = step.queries.shape
    if step.softcap is not None:
        return torch.cat([(p.to(slots.values.dtype) @ slots.values.unsqueeze(2)) for _, p in step.blocks(slots)], dim=3)
    mask, causal = _mask(step, slots, n)
    out = scaled_dot_product_attention(
        step.queries.reshape(b, h * g, n, -1),
        step.read_keys(slots),
        slots.values,
        attn_mask=mask,
        is_causal=causal,
        scale=step.scale,
        enable_gqa=g > 1,
    )
    return out.view(b, h, g, n, -1)


def _mask(step: Step, slots: Slots, n: int) -> tuple[Tensor | None, bool]:
    """The mask for the fused kernels (`[n, S]` or `[B, H_q, n, S]`), and whether plain causal masking says it all."""
    bias = step.bias(slots)
    past = slots.size - n
    if bias is None:
        if n == 1 or past == 0:
            return None, n > 1
        causal = torch.ones(n, slots.size, dtype=torch.bool, device=slots.keys.device).tril(past)
        return causal, False
    g = step.queries.shape[2]
    seen = slots.positions[:, :, None, :] <= step.query_positions[:, None, :, None]  # [B, H, n, S]
    # A padding query sees nothing; let it see everything instead, its output is never used and must not be NaN.
    seen = seen | (step.query_positions < 0)[:, None, :, None]
    full = torch.where(seen, bias.unsqueeze(2), -torch.inf)
    full = torch.where((step.query_positions < 0)[:, None, :, None], 0.0, full)
    return full.repeat_interleave(g, dim=1).to(step.queries.dtype), False
