"""Attention Matching (Zweiger et al., 2026): a merge as a fit of the attention's mass and output."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvrepro import kernels
from kvrepro.attention import Step, observe
from kvrepro.fit import MARGIN, best_weights, fit_values, in_rows, mixed, pursued, tf32
from kvrepro.methods.base import POSITIONS, Method, option
from kvrepro.slots import FlatSlots, Slots, compact, flatten, has_kernel, protected, top, uniform

#: Methods that can choose the slots instead, with the options that this takes: a slot of theirs weighs as one token, or
#: as its cardinality in the logits, and what they leave depends on no state, gradient or layer.
BASES: dict[str, dict[str, Any]] = {
    "streaming_llm": {},
    "h2o": {},
    "tova": {},
    "snapkv": {},
    "keydiff": {},
    "random": {},
    "weightedkv": {},
    "kvmerger": {"mass": "attention"},  # its default divides a value by |S| at the next merge: wrong once it is fitted
    "kvslimmer": {},
}

#: Streams of the two uniform numbers that a normal one is made of.
_RADIUS, _ANGLE = 3, 4
#: Bytes of shares of the mass, keys and values that are held side by side where heads of several layers are fitted.
_TOGETHER = 3 << 28
#: Slots of heads that are fitted side by side are filled up with empty ones to a multiple of this many: products with
#: rows that begin anywhere take twice as long on a GPU.
_ALIGNED = 16
_SIDES = ("keys", "values", "positions", "cardinality")


@dataclass(frozen=True)
class AttentionMatching(Method):
    """Keep the most attended keys, and fit biases and values that give the whole cache's attention mass and output.

    For each KV head, on reference queries: the kept keys' weights e^bias come from non-negative least squares, so that
    they carry the whole cache's mass, then their values from ridge regression, so that they give its output. The "whole
    cache" is what the slots hold when they overflow: fitted slots of earlier rounds, and the tokens since. A head that
    cannot be fitted, or whose fit is no better on held-out queries, keeps its slots as they are (plain eviction).
    `slots.state["fallbacks"]` counts these for each head.

    Ours: the heads of all layers share their slots (`heads`). When a prompt first overflows the cache, all layers wait
    for the last one, and the slots go to what the reference queries attend to most, in whatever head that is; each has
    a share of the budget at least (`least`). From then on a head holds what it was given: `CompressedLayer.rooms`. What
    is stored has no empty slots, so the bytes are those of the mean. The paper (second-hand) gives heads different
    numbers of slots, too, found once for a model by trying. Tokens that come one at a time share nothing out: without
    the many queries of a prompt it is not known who needs more.

    Ours: where a pass has more tokens than `count`, a slot's score is the mean of its own and those of the tokens on
    either side, because what a query that is left out looks at is near what the queries beside it look at.

    Ours: while decoding, slots are chosen but not fitted: those of a prompt keep what its fit gave them. A few queries
    barely look at most slots, so what answers them can be anything; and fit upon fit, values grew without bound.

    Ours: a share of the slots to choose, `newest`, goes to what the newest query attends to, the same in all heads of a
    layer, because a text's own queries do not ask for what a question at its end asks for; and the ridge on a slot's
    value is divided by (1 - peak)^2, its peak being the highest attention that a reference query gives it.

    `keys` may name another method. Its own slots are then fitted, evicted or merged as it does with its own defaults
    (`sinks`, `recent`, `positions`, `seed` and `block` are handed on where they are set): what is chosen and what is
    fitted can be told apart. While decoding, a method that lets one slot go at a time frees a block of them.

    The paper's reference queries are those of the context read twice, or of questions that the model asks itself. Both
    need further passes of the model. By default they are those of the tokens just read, moved to future positions.
    `queries="repeat"` takes the paper's first way: `kvrepro.prefill` (and so `kvrepro.generate`) reads each chunk that
    overflows a second time, behind itself and with nothing compressed yet, and stores nothing of that. These queries
    are moved as well (ours). It costs a second pass over the chunk, until which all layers hold the whole chunk; and
    its tokens stand behind the prompt, where the model's context must reach. A plain `model.generate` has no such pass:
    that is an error. While decoding, and for a last chunk shorter than the window, the reference queries are the last
    `window` ones in any case.

    While decoding, choosing slots by "rms" or "mass" is work that a CUDA graph can hold (`leaves`). With greedy keys,
    another method's, or drawn queries the step that chooses runs launch by launch.
    """

    name: ClassVar[str] = "attention_matching"
    title: ClassVar[str] = "Attention Matching"
    kind: ClassVar[str] = "merging"
    paper: ClassVar[str] = "Fast KV Compaction via Attention Matching (2026)"
    url: ClassVar[str] = "https://arxiv.org/abs/2602.16284"
    needs_rotation: ClassVar[bool] = True
    whole_numbers: ClassVar[tuple[str, ...]] = ("sinks", "recent", "window", "rounds")
    builds_on: ClassVar[tuple[str, ...]] = ("keys",)

    sinks: int | None = option(None, "ours: none (None); with a method's `keys`, that method's own")
    recent: int | None = option(
        None,
        "ours: the newest token only (None), which few queries have seen; with a method's `keys`, that method's own",
    )
    positions: str | None = option(
        None,
        "ours: as the model numbered the tokens (None); with a method's `keys`, that method's own",
        (None, *POSITIONS),
    )
    keys: str = option(
        "rms",
        "second-hand: the highest root mean square attention of the reference queries; 'greedy' (second-hand) pursues "
        "what the chosen keys lack of the whole mass; 'mass' (ours) takes the mean; a method's name (ours) fits the "
        "slots that it leaves",
        ("rms", "mass", "greedy", *BASES),
    )
    newest: float | None = option(
        None,
        "ours: this share of the slots to choose goes to what the newest query attends to most, averaged over the "
        "layer's heads as TOVA does; the rest goes by `keys`. None is 0.25 where slots are pooled, else 0.5; not for a "
        "method's `keys`",
    )
    queries: str = option(
        "prompt",
        "ours: the pass's own queries at future positions; 'gaussian' (ours) draws from a Gaussian fitted to them; "
        "'repeat' (second-hand) takes those of the tokens read a second time, behind themselves",
        ("prompt", "gaussian", "repeat"),
    )
    heads: str | None = option(
        None,
        "ours: 'pooled' (None) shares the slots out among the heads of all layers, 'same' gives each as many, as do a "
        "method's `keys` (None)",
        (None, "pooled", "same"),
    )
    least: float | None = option(
        None, "ours: where slots are pooled, each head has this share of the budget at least (None is 0.1)"
    )
    count: int = option(2048, "ours: reference queries a query head, spread evenly over the pass; they choose the keys")
    fitted: int = option(64, "ours: of these, those that biases and values are fitted to, spread evenly over them")
    ahead: int = option(128, "ours: they stand at the next 128 positions, in turns")
    window: int | None = option(None, "ours: reference queries while decoding; None is budget / 16, at most 32")
    rounds: int = option(10, "ours: rounds at most of the fit of biases; 0 fits none")
    ridge: float = option(
        0.01,
        "ours: the least ridge, as a share of a slot's mean square of attention; a head takes it, 10 or 100 times it, "
        "whichever is best on held-out queries",
    )
    block: int | None = option(None, "ours: while decoding, free this many slots at a time; None is budget / 16")

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        for name in ("count", "ahead", "block"):
            self.require_whole(name, 1)
        self.require_whole("fitted", 2)  # a half that judges, and one that is fitted to
        self.require_number("ridge", 1e-9, 1e9)
        if self.base is None:
            self._settle("heads", "pooled")
            self._settle("newest", 0.25 if self.heads == "pooled" else 0.5)
            self.require_number("newest", 0, 1)
        elif self.heads == "pooled":
            raise ValueError(
                f"{self.name}: heads='pooled' is not valid with keys={self.keys!r}, which leaves each head as many "
                "slots; leave heads out, or choose keys='rms' or 'mass'"
            )
        elif self.newest is not None:
            raise ValueError(
                f"{self.name}: newest={self.newest!r} is not valid with keys={self.keys!r}, which chooses all slots; "
                "leave newest out, or choose keys='rms' or 'mass'"
            )
        self._settle("heads", "same")
        self._settle("positions", "original" if self.base is None else self.base.positions)
        if self.shares_layers:
            self._settle("least", 0.1)
            self.require_number("least", 0, 1)
        elif self.least is not None:
            raise ValueError(
                f"{self.name}: least={self.least!r} is not valid with heads='same'; leave it out, or pool the slots"
            )

    def _settle(self, name: str, default: Any) -> None:
        """Give an option that was left open its value, so that records name it."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    @functools.cached_property
    def base(self) -> Method | None:
        """The method that chooses the slots; None where this one does."""
        if self.keys not in BASES:
            return None
        from kvrepro import methods  # the registry knows this module too

        known = {f.name for f in dataclasses.fields(methods.get(self.keys))}
        shared = {name: getattr(self, name) for name in ("sinks", "recent", "positions", "seed", "block")}
        handed = {name: value for name, value in shared.items() if value is not None and name in known}
        return methods.create(self.keys, **BASES[self.keys], **handed)

    @property
    def shares_layers(self) -> bool:
        """Whether the heads of all layers share their slots."""
        return self.heads == "pooled"

    @property
    def shares_heads(self) -> bool:
        """Whether heads hold different numbers of slots."""
        return self.shares_layers

    def shares_at(self, arrived: int) -> bool:
        """A pass of several tokens shares slots out."""
        return self.shares_layers and arrived > 1

    @property
    def frees_blocks(self) -> bool:
        """Whether the method that chooses the slots frees them a block at a time while decoding, as this one does."""
        return self.base is not None and any(f.name == "block" for f in dataclasses.fields(self.base))

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the method that chooses the slots needs."""
        return () if self.base is None else self.base.statistics

    @property
    def accumulates(self) -> tuple[str, ...]:
        """The biases, and what the method that chooses the slots keeps."""
        return ("bias",) if self.base is None else ("bias", *self.base.accumulates)

    @property
    def cardinality_bias(self) -> bool:
        """Whether the biases come beside the slots' log cardinality, as the method that merged them has it."""
        return self.base is not None and self.base.cardinality_bias

    @property
    def observes(self) -> bool:
        """As the method that chooses the slots."""
        return self.base is not None and self.base.observes

    @property
    def replayable(self) -> bool:
        """Not where the tokens are to be read twice."""
        return self.queries != "repeat"

    def reads_twice(self, arrived: int, budget: int) -> bool:
        """With `queries="repeat"`, but where the window's queries serve."""
        return self.queries == "repeat" and arrived > 1 and arrived >= self.window_of(budget)

    @property
    def sums(self) -> bool:
        """As the method that chooses the slots."""
        own = type(self).accumulate is AttentionMatching.accumulate
        return own and (self.base is None or self.base.sums)

    def sinks_of(self, budget: int) -> int:
        """`sinks`, or those of the method that chooses the slots."""
        return (self.sinks or 0) if self.base is None else self.base.sinks_of(budget)

    def recent_of(self, budget: int) -> int:
        """The newest token, and `recent` tokens where that is more; or those of the method that chooses the slots."""
        return max(1, self.recent or 0) if self.base is None else self.base.recent_of(budget)

    def window_of(self, budget: int) -> int:
        """The observation window: a query head's query takes half a slot's bytes, so it is narrow (ours).

        It is no narrower than that of the method that chooses the slots.
        """
        own = min(32, budget // 16) if self.window is None else min(self.window, budget)
        return own if self.base is None else max(own, self.base.window_of(budget))

    def block_of(self, budget: int) -> int:
        """Slots freed at a time while decoding."""
        if self.frees_blocks:
            return self.base.block_of(budget)
        return max(1, budget // 16) if self.block is None else self.block

    def leaves(self, budget: int) -> int | None:
        """A block less than the slots that are one too many; no promise for `keys` or `queries` that take more work."""
        plain = self.keys in ("rms", "mass") and self.queries != "gaussian"
        return budget + 1 - self.block_of(budget) if plain else None

    def least_of(self, budget: int) -> int:
        """The fewest slots that a head is given where slots are pooled: enough to free a block of them, too."""
        need = self.sinks_of(budget) + self.recent_of(budget) + self.block_of(budget)
        return min(budget, max(int(self.least * budget), need))

    def check(self, budget: int) -> None:
        """Check that there is a choice, and room for a block.

        Raises:
            ValueError: fewer than sinks + recent + 1 slots, or a block that leaves less.
        """
        if self.frees_blocks:
            return self.base.check(budget)
        super().check(budget)
        need = self.sinks_of(budget) + self.recent_of(budget) + 1
        if budget - self.block_of(budget) + 1 < need:
            raise ValueError(
                f"{self.name}: a budget of {budget} slots, less a block of {self.block_of(budget)}, is below "
                f"sinks + recent + 1 = {need}; lower sinks, recent or block, or raise the budget"
            )

    def initial_state(self, slots: Slots) -> dict[str, Tensor]:
        """No head has fallen back yet."""
        return {"fallbacks": slots.positions.new_zeros(slots.positions.shape[:2], dtype=torch.float32)}

    def accumulate(self, slots: Slots, found: dict[str, Tensor], step: Step) -> Slots:
        """As the method that chooses the slots; biases are its slots' own."""
        if self.base is None:
            return super().accumulate(slots, found, step)
        seen = self.base.accumulate(slots, found, step)
        return dataclasses.replace(seen, stats={**seen.stats, "bias": slots.stats["bias"]})

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots | FlatSlots:
        """Choose the slots that stay, then fit them to what a prompt's reference queries get from all."""
        if step.queries.shape[3] == 1:  # while decoding
            found = self._see(slots, budget, step) if self.base is None else None
            left = self._left(slots, budget, dataclasses.replace(step, found=found))
            return dataclasses.replace(left, state=slots.state or self.initial_state(slots))
        seen = step.found or self._see(slots, budget, step)
        if seen.peers is not None:
            return seen.peers.compressed(step.layer)
        return self._compressed([(slots, dataclasses.replace(step, found=seen))], budget)[0]

    def _compressed(self, layers: list[tuple[Slots, Step]], budget: int) -> list[Slots | FlatSlots]:
        """`compress`, several layers side by side, given what was seen of each."""
        if layers[0][1].rooms is None:
            left = [self._left(slots, budget, step) for slots, step in layers]
            return [self._fitted(*each) for each in zip(left, layers, strict=True)]
        chosen = [
            self._chosen(slots, budget, step) if step.found.keep is None else step.found.keep for slots, step in layers
        ]
        flat = [flatten(slots, keep, step.found.left) for keep, (slots, step) in zip(chosen, layers, strict=True)]
        return self._fitted_by_size(flat, layers, budget)

    def _left(self, slots: Slots, budget: int, step: Step) -> Slots:
        """The slots that stay, as they are."""
        freed = self.block_of(budget) - 1 if step.queries.shape[3] == 1 else 0
        if self.base is not None:
            return self._left_by_base(slots, budget, budget - freed, step)
        keep = self._chosen(slots, budget, step, freed)
        if step.one_over:
            size = slots.size - 1 - freed
        elif step.rooms is None and not (slots.ragged and freed):
            size = min(budget - freed, slots.size)  # as many for each head, known without looking
        else:
            size = int(keep.sum(dim=2).max())
        left = compact(slots, keep, size, whole=step.one_over and step.rooms is None)
        return left if step.rooms is None else dataclasses.replace(left, ragged=True)

    def _see(self, slots: Slots, budget: int, step: Step) -> _Seen:
        """Look at all slots before any leaves."""
        asked, decoding = self.reference(slots, step, budget), step.queries.shape[3] == 1
        # The window's queries are few, and nothing is fitted to them.
        some = asked if decoding and self.queries != "gaussian" else _some(asked, self.fitted)
        together = some is asked and not decoding
        score = now = None
        if self.base is None:
            seen = observe(asked, slots, power=1 if self.keys == "mass" else 2, output=together)
            score = seen.mass
            if step.queries.shape[3] > self.count:
                # What queries that are left out would find is near what those beside them do.
                sampled = _counted(asked.query_positions) < _counted(step.query_positions)
                score = torch.where(sampled[..., None], _smoothed(score, slots), score)
            now = observe(step.last(1), slots, output=False).mass if self.queries == "gaussian" else seen.newest()
            now = _by_token(now, slots)
        if decoding:
            return _Seen(some, score=score, now=now)
        fits = seen if together and self.base is None else observe(some, slots, power=None)
        return _Seen(some, fits.output, fits.lse, score, now)

    def waiting(self, slots: Slots, budget: int, step: Step) -> Step:
        """What was seen; of the queries themselves two, since a step of one would free a block."""
        two = dataclasses.replace(step.last(2), queries=step.queries[:, :, :, -2:].clone(), view=None, again=None)
        return dataclasses.replace(two, found=self._see(slots, budget, step))

    def split(self, layers: list[Slots], steps: list[Step], budget: int) -> list[Tensor]:
        """The slots of each head, `[B, H_kv]` int32 a layer: what is attended to most, in whatever head, is kept.

        A row that still fits has the budget in every head; one whose slots were shared out before keeps its shares.

        Args:
            layers: all slots.
            steps: what was seen of them.
            budget: mean slots a head and layer.
        """
        device, least = layers[0].keys.device, self.least_of(budget)
        ends, size = (self.sinks_of(budget), self.recent_of(budget)), max(slots.size for slots in layers)

        pad = torch.nn.functional.pad

        def stacked(parts: Iterable[Tensor]) -> Tensor:
            """`[B, L, H, S]` of each layer's `[B, H, S]`, zeros in front of a shorter one."""
            more = ((x.to(device), size - x.shape[2]) for x in parts)
            return torch.stack([pad(x, (n, 0)) if n else x for x, n in more], dim=1)

        seen = [step.found for step in steps]
        valid = stacked(slots.valid for slots in layers)
        safe = stacked(protected(slots, *ends) for slots in layers)
        score = stacked(x.score for x in seen).masked_fill(safe, torch.inf).masked_fill(~valid, -1.0)
        count = valid.sum(dim=-1)  # [B, L, H]
        pool = score.sort(dim=-1, descending=True).values[..., least:]
        wanted = (budget - least) * count[0].numel()
        order = pool.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :wanted]
        given = torch.zeros_like(count.flatten(1)).scatter_add_(1, order // pool.shape[-1], torch.ones_like(order))
        known = [torch.full_like(count[:, 0], budget) if x.rooms is None else x.rooms.to(device) for x in steps]
        old = torch.stack(known, dim=1)  # [B, L, H]
        first = ((count > budget) & (old == budget).all(dim=(1, 2), keepdim=True)).all(dim=(1, 2), keepdim=True)
        rooms = torch.where(first, least + given.view_as(count), old).to(torch.int32)
        left = torch.minimum(count, rooms)
        keep = None
        if self.keys != "greedy":
            now = stacked(x.now.expand_as(x.score) for x in seen)
            free = (left - safe.sum(dim=-1)).unsqueeze(-1)
            keep = self._marked(*(x.flatten(1, 2) for x in (score, now, valid, safe, free))).view_as(valid)
        # The host waits for all that it needs to know, and then launches work ahead of the device.
        kept, fits = torch.stack([left, left * (count > rooms)]).cpu().unbind()
        shares = [mine.contiguous().to(slots.keys.device) for mine, slots in zip(rooms.unbind(1), layers, strict=True)]
        told = []
        for i, (slots, step) in enumerate(zip(layers, steps, strict=True)):
            mine = None if keep is None else keep[:, i, :, size - slots.size :].to(slots.keys.device)
            # These know of no peers, so that all is let go.
            found = dataclasses.replace(step.found, left=kept[:, i], fits=fits[:, i], keep=mine)
            told.append(dataclasses.replace(step, rooms=shares[i], found=found))
        peers = _Peers(self, budget, list(zip(layers, told, strict=True)))
        for step in steps:
            step.found.peers = peers
        return shares

    def _left_by_base(self, slots: Slots, budget: int, goal: int, step: Step) -> Slots:
        """The slots that the method of `keys` leaves, `goal` of those of a row that exceeds the budget."""
        width = self.base.window_of(budget)
        if width:
            window, places = step.window_queries[:, :, :, -width:], step.window_positions[:, -width:]
            step = dataclasses.replace(step, window_queries=window, window_positions=places)
        if goal == budget or self.frees_blocks:
            return self.base.compress(slots, budget, step)
        # What it protects goes by the budget, not by the goal; None is StreamingLLM's: all that the goal leaves.
        ends = {"sinks": self.base.sinks_of(budget), "recent": self.base.recent_of(budget) or self.base.recent}
        left = dataclasses.replace(self.base, **ends).compress(slots, goal, step)
        return _with_rows(left, slots, slots.valid.sum(dim=2) <= budget) if slots.ragged else left

    def _chosen(self, slots: Slots, budget: int, step: Step, freed: int = 0) -> Tensor:
        """`[B, H_kv, S]` bool: the slots that stay, those attended to most, of a head that holds more than it may.

        Args:
            slots: all.
            budget: slots that a head may have, where `step.rooms` does not say how many each may.
            step: the pass, with what was seen of the slots.
            freed: slots that a head is to have less.
        """
        seen, rooms = step.found, step.rooms
        ends = self.sinks_of(budget), self.recent_of(budget)
        room = budget if rooms is None else rooms.unsqueeze(-1)
        safe = protected(slots, *ends, in_front=step.one_over)
        if step.one_over:
            free = room - (freed + sum(ends))
        else:
            count = slots.valid.sum(dim=2, keepdim=True)
            free = torch.where(count > room, room - freed, count) - safe.sum(dim=2, keepdim=True)
        pursue = None
        if self.keys == "greedy":
            shares = torch.cat([p for _, p in seen.asked.blocks(slots)], dim=3)
            pursue = functools.partial(pursued, shares)
        return self._marked(seen.score, seen.now.expand_as(seen.score), slots.valid, safe, free, pursue)

    def _marked(
        self,
        score: Tensor,
        now: Tensor,
        valid: Tensor,
        safe: Tensor,
        free: Tensor | int,
        pursue: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
    ) -> Tensor:
        """`[B, H, S]` bool: the protected slots, what the newest query attends to most, then what all queries do.

        Args:
            score: `[B, H, S]`, what goes by `keys`.
            now: `[B, H, S]`, the newest query's attention.
            valid: `[B, H, S]`, filled slots.
            safe: `[B, H, S]`, slots that stay in any case.
            free: how many are to be chosen beside them, one number or `[B, H, 1]`.
            pursue: chooses by marks, candidates and number instead of by the highest score.
        """
        first = int(free * self.newest) if isinstance(free, int) else (free.double() * self.newest).int()
        keep = top(now.contiguous(), valid, first, safe)
        if pursue is not None:
            return keep | pursue(keep, valid, free - first)
        return top(score, valid, free - first, keep)

    def reference(self, slots: Slots, step: Step, budget: int) -> Step:
        """The step whose queries are fitted to: `[B, H_kv, G, m, d]`, behind the newest token, so that they see all.

        The newest one stands right behind the newest token, the one before it a position further. In each row the first
        half of the queries that count stands in the first m // 2 places, the others in the rest: the fit's two halves.
        Places that are left over have the position -1.

        Raises:
            ValueError: the tokens were to be read twice, and were not.
        """
        queries, places = step.queries, step.query_positions
        again = self.reads_twice(queries.shape[3], budget)
        if again and step.again is None:
            raise ValueError(
                f"{self.name}: queries='repeat' needs the tokens read a second time, which only kvrepro.prefill does: "
                "read the prompt with it, write with kvrepro.generate, or choose queries='prompt'"
            )
        if again:
            queries, places = step.again.queries, step.again.query_positions
        elif queries.shape[3] < self.window_of(budget):
            queries, places = step.window_queries, step.window_positions
        newest = slots.positions.amax(dim=(1, 2))[:, None]  # [B, 1]
        if self.queries == "gaussian":
            wide = queries.to(torch.promote_types(queries.dtype, torch.float32))
            plain = _turned(step, wide, -places.clamp_min(0))
            queries = self._drawn(plain, places >= 0, step.layer)
            behind = torch.arange(self.count - 1, -1, -1, dtype=torch.int32, device=places.device)
            behind = behind.expand(len(places), -1)
            old, empty = torch.zeros_like(behind), (newest < 0).expand_as(behind)
        elif step.queries.shape[3] == 1 and places.shape[1] <= self.count:  # all of the window, and nothing is fitted
            old, empty = places, places < 0
            upto = (~empty).cumsum(dim=1)
            behind = upto[:, -1:] - upto
        else:
            n, count = places.shape[1], _counted(places)
            rank, among, empty = _evenly(count, min(n, self.count))
            behind = (count.clamp_max(self.count) - 1 - rank).clamp_min(0)
            index = (among + n - count).clamp(0, n - 1)  # padding is in front
            queries = queries.gather(3, index[:, None, None, :, None].expand(*queries.shape[:3], -1, queries.shape[4]))
            old = places.gather(1, index)
        place = (newest + 1 + behind % self.ahead).to(torch.int32)
        turned = _turned(step, queries, place - old).to(slots.keys.dtype)
        places = place.masked_fill(empty, -1)
        return dataclasses.replace(step, queries=turned, query_positions=places, view=None, again=None, behind=True)

    def _drawn(self, queries: Tensor, valid: Tensor, layer: int) -> Tensor:
        """`[B, H_kv, G, count, d]`: draws from the Gaussian of each query head's `[B, H_kv, G, n, d]`; valid `[B, n]`.

        The draws depend on seed, layer and head, not on the row or on how it is padded.
        """
        _, h, g, _, d = queries.shape
        weight = valid[:, None, None, :, None].to(torch.float64)
        total = weight.sum(dim=3, keepdim=True).clamp_min(1.0)
        mean = (queries * weight).sum(dim=3, keepdim=True) / total
        off = (queries - mean) * weight
        spread = off.mT @ off / total + 1e-9 * torch.eye(d, dtype=weight.dtype, device=weight.device)
        factor, failed = torch.linalg.cholesky_ex(spread)
        factor = torch.where((failed == 0)[..., None, None], factor, 0.0)
        heads = torch.arange(h * g * self.count, device=queries.device)[:, None]
        dims = torch.arange(d, device=queries.device)
        radius, angle = (uniform(self.seed, layer, heads, dims, stream) for stream in (_RADIUS, _ANGLE))
        normal = (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()
        return (mean + normal.view(h, g, self.count, d).double() @ factor.mT).to(queries.dtype)

    def _fitted(self, left: Slots, layer: tuple[Slots, Step]) -> Slots:
        """The slots that stay, fitted where a head lost any and could be fitted."""
        slots, seen = layer[0], layer[1].found
        values, bias, good = self.fit(left, seen.asked, seen.output, seen.lse)
        cut = left.valid.sum(dim=2) < slots.valid.sum(dim=2)  # a row of a batch that still fits stays as it is
        changed = (good & cut).unsqueeze(-1)
        return dataclasses.replace(
            left,
            values=torch.where(changed.unsqueeze(-1), values, left.values),
            stats={**left.stats, "bias": left.stats["bias"] + torch.where(changed, bias, 0.0)},
            state=_counted_fallbacks(left.state, cut & ~good),
        )

    def _fitted_by_size(self, left: list[FlatSlots], layers: list[tuple[Slots, Step]], budget: int) -> list[FlatSlots]:
        """`_fitted`, heads of like numbers of slots side by side, which may be of several layers.

        The shares of the heads that are fitted at a time, and the copies of their slots, take no more memory than those
        of all heads of a layer do with `budget` slots each, or than `_TOGETHER` says, or an eighth more, so that those
        with a few slots above the mean leave no small group; and less than half of it is empty before heads are filled
        up to `_ALIGNED`.
        """
        seen, (b, h), device = [step.found for _, step in layers], left[0].count.shape, left[0].count.device
        kept = torch.stack([mine.count for mine in left])  # [L, B, H_kv]
        cut = kept < torch.stack([slots.valid.sum(dim=2) for slots, _ in layers])
        numbers = (kept * cut).cpu() if any(x.fits is None for x in seen) else torch.stack([x.fits for x in seen])
        order = (kept * cut).flatten().sort(stable=True).indices  # numbers of all heads, those of a layer in turn
        end = kept.flatten().cumsum(0)[:, None]
        begin = end - kept.flatten()[:, None]
        empty = sum(mine.rows.positions.shape[0] for mine in left)  # a row behind all that holds nothing

        def joined(parts: Iterable[Tensor], fill: int = 0) -> Tensor:
            """The slots of all heads of all layers, `[N + 1, ...]`."""
            parts = list(parts)
            return torch.cat([*parts, parts[0].new_full((1, *parts[0].shape[1:]), fill)])

        rows = [mine.rows for mine in left]
        whole = {name: joined((getattr(x, name) for x in rows), -1 if name == "positions" else 0) for name in _SIDES}
        stats = {name: joined(x.stats[name] for x in rows) for name in rows[0].stats}
        queries, outputs, lse = (
            torch.cat([x.flatten(0, 1) for x in parts]).unsqueeze(1)
            for parts in ([x.asked.queries for x in seen], [x.output for x in seen], [x.lse for x in seen])
        )
        places = torch.cat([x.asked.query_positions for x in seen])
        good = torch.ones(kept.numel(), dtype=torch.bool, device=device)
        limit = max(b * h * budget, _TOGETHER // _bytes_of_slot(layers[0][0], seen[0].asked)) * 9 // 8
        for part, width in _alike(numbers.flatten().sort().values.tolist(), limit):
            heads = order[part]
            width = -(-width // _ALIGNED) * _ALIGNED
            slot = end[heads] - width + torch.arange(width, device=device)
            slot = torch.where(slot < begin[heads], empty, slot).unsqueeze(1)  # [n, 1, width]
            mine = Slots(
                **{name: x[slot] for name, x in whole.items()},
                stats={name: x[slot] for name, x in stats.items()},
                dense=False,
                ragged=True,
            )
            step = dataclasses.replace(seen[0].asked, queries=queries[heads], query_positions=places[heads // h])
            values, bias, fits = self.fit(mine, step, outputs[heads], lse[heads])
            good[heads], fits = fits[:, 0], fits.unsqueeze(-1)
            whole["values"][slot] = torch.where(fits.unsqueeze(-1), values, mine.values)
            stats["bias"][slot] = mine.stats["bias"] + torch.where(fits, bias, 0.0)
        lengths = [len(x.positions) for x in rows]
        values, biases = (x[:-1].split(lengths) for x in (whole["values"], stats["bias"]))
        fell = cut & ~good.view_as(cut)
        # Copies, so that a layer holds no other's memory.
        new = [
            dataclasses.replace(
                mine,
                values=values[i].clone(),
                stats={**mine.stats, "bias": biases[i].clone()},
                state=_counted_fallbacks(mine.state, fell[i]),
            )
            for i, mine in enumerate(rows)
        ]
        return [dataclasses.replace(mine, rows=its) for mine, its in zip(left, new, strict=True)]

    def fit(self, left: Slots, asked: Step, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the kept slots should have.

        Args:
            left: the slots that stay, as they were.
            asked: the reference queries.
            output: `[B, H_kv, G, m, d_v]`, what they get from all slots; 0 for a place without a query.
            lse: `[B, H_kv, G, m]`, log-sum-exp of their logits at all slots; +inf for a place without a query.

        Returns:
            Values `[B, H_kv, S, d_v]`, what is to be added to the biases `[B, H_kv, S]`, and `[B, H_kv]` bool: the head
            could be fitted, and on the second half of the queries, values fitted to the first half have a smaller
            error than the slots as they were.
        """
        share = _shares(asked, lse, left)
        short = left.values.element_size() == 2  # numbers of 16 bits
        weights = best_weights(share, self.rounds, coarse=short)
        judge, tiny = slice(share.shape[3] // 2, None), torch.finfo(share.dtype).tiny
        # A line times a matrix is several times as fast on a CPU as a matrix times a column.
        totals = (weights.unsqueeze(2) @ in_rows(share).mT).unflatten(3, share.shape[3:1:-1])  # [B, H_kv, 1, m, G]
        totals = totals.transpose(2, 4)  # [B, H_kv, G, m, 1]
        filled = left.valid.sum(dim=2) if left.ragged else None
        ridges = [self.ridge * factor for factor in (1, 10, 100)]
        # The ridge is above what rounding changes in PP', and outputs of 16 bits were rounded as much or more.
        with tf32(self.ridge >= 0.01 and short):
            held, wanted = share[:, :, :, judge], output[:, :, :, judge]
            before = _squared(mixed(held, left.values) / held.sum(-1, keepdim=True).clamp_min(tiny) - wanted)
            p = share.div_(totals.clamp_min(tiny))  # attention is weights * p
            # What a query looks at alone should answer it as it is: a slot moves the less, the higher its peak.
            loose = 1 - weights * p.amax(dim=(2, 3))  # [B, H, S]
            rest = output - mixed(p, weights[..., None] * left.values)
            found = fit_values(p.mul_((weights * loose)[:, :, None, None]), rest, None, ridges, filled=filled)
        del share, held, p  # much of the memory
        values = (left.values + loose[..., None] * found.values).to(left.values.dtype)
        bias = weights.log().to(left.stats["bias"].dtype)
        # A sum is finite only if all of its numbers are.
        total = values.sum(dim=(2, 3), dtype=torch.promote_types(values.dtype, torch.float32))
        sound = (total + bias.sum(dim=2)).isfinite()
        return values, bias, sound & (_squared(rest[:, :, :, judge]) - found.gain < (1 - MARGIN) * before)


@dataclass
class _Seen:
    """What queries see of all slots before any leaves.

    Attributes:
        asked: the reference queries that are fitted to.
        output: `[B, H_kv, G, m, d_v]`, what they get from all slots; 0 for a place without a query. None while
            decoding.
        lse: `[B, H_kv, G, m]`, log-sum-exp of their logits at all slots; +inf for a place without a query. None while
            decoding.
        score: `[B, H_kv, S]`, attention of all reference queries to each slot, or its square, summed over them; in rows
            where they are only some of the pass's queries, its mean with the slots of the tokens on either side. None
            with a method's `keys`.
        now: `[B, H_kv, S]`, or `[B, 1, S]` where it is the same for all heads, the newest query's attention to a slot's
            token, the mean over the heads of the layer that hold it, summed over a group; None with a method's `keys`.
        peers: the layers that this one shares its slots with, once they are shared out.
        left: `[B, H_kv]` on the host, the slots that each head is then left with, where that is known.
        fits: `[B, H_kv]` on the host, how many of these are fitted: none of a head that loses none.
        keep: `[B, H_kv, S]` bool, which slots those are, where they were chosen for all layers at once.
    """

    asked: Step
    output: Tensor | None = None
    lse: Tensor | None = None
    score: Tensor | None = None
    now: Tensor | None = None
    peers: _Peers | None = None
    left: Tensor | None = None
    fits: Tensor | None = None
    keep: Tensor | None = None


class _Peers:
    """Layers that shared out their slots: they are compressed in turn, a few side by side where memory allows."""

    def __init__(self, method: AttentionMatching, budget: int, layers: list[tuple[Slots, Step]]) -> None:
        """Layers in turn, all their slots and what was seen of them, with the `rooms` that they were given."""
        self._method, self._budget = method, budget
        self._waiting = {step.layer: (slots, step) for slots, step in layers}
        self._done: dict[int, Slots] = {}

    def compressed(self, layer: int) -> Slots:
        """The slots that a layer is left with."""
        if layer not in self._done:
            slots, step = self._waiting[layer]
            alike = [i for i, other in self._waiting.items() if _can_join((slots, step), other)]
            each = step.rooms.numel() * self._budget * _bytes_of_slot(slots, step.found.asked)
            now = alike[alike.index(layer) :][: max(1, _TOGETHER // each)]
            layers = [self._waiting.pop(i) for i in now]
            self._done.update(zip(now, self._method._compressed(layers, self._budget), strict=True))
        return self._done.pop(layer)


def _can_join(one: tuple[Slots, Step], other: tuple[Slots, Step]) -> bool:
    """Whether heads of two layers can be fitted side by side."""
    same = [
        (x.scale, x.softcap, x.rotation, x.found.asked.queries.shape, slots.values.shape[3])
        for slots, x in (one, other)
    ]
    return same[0] == same[1] and one[0].keys.device == other[0].keys.device


def _counted_fallbacks(state: Mapping[str, Tensor], fell: Tensor) -> dict[str, Tensor]:
    """A layer's state after a fit in which heads `[B, H_kv]` bool fell back."""
    return {"fallbacks": state.get("fallbacks", 0.0) + fell.float()}


def _smoothed(score: Tensor, slots: Slots) -> Tensor:
    """The mean of a score `[B, H_kv, S]` over a slot and those of the tokens before and after its own."""
    token = torch.where(slots.valid, slots.positions, -2)
    beside = ((token.diff(dim=2) == 1) & slots.valid[..., :-1]).to(score.dtype)  # a slot and the next one
    total, count = score.clone(), torch.ones_like(score)
    total[..., :-1].addcmul_(score[..., 1:], beside)
    total[..., 1:].addcmul_(score[..., :-1], beside)
    count[..., :-1] += beside
    count[..., 1:] += beside
    return total.div_(count)


def _by_token(score: Tensor, slots: Slots) -> Tensor:
    """The mean of a score `[B, H_kv, S]` over the heads that hold a slot of the same token; `[B, 1, S]` if all do."""
    if slots.dense:
        return score.mean(dim=1, keepdim=True)
    if has_kernel(score):
        from kvrepro.kernels import merging

        # An empty slot between others, as padding of a later pass is, takes the place before its own.
        return merging.by_token(score, slots.positions.cummax(dim=2).values)
    token, order = slots.positions.flatten(1).sort(dim=1)
    token = torch.nn.functional.pad((token[:, 1:] != token[:, :-1]).cumsum(dim=1), (1, 0))  # those there are, counted
    score = score.flatten(1).gather(1, order)
    total, holders = (torch.zeros_like(score).scatter_add_(1, token, x) for x in (score, torch.ones_like(score)))
    mean = (total / holders.clamp_min(1)).gather(1, token)
    return torch.empty_like(mean).scatter_(1, order, mean).view_as(slots.positions)


def _bytes_of_slot(slots: Slots, asked: Step) -> int:
    """Bytes that a slot takes in a fit: its shares for all reference queries of a head, and its key and value."""
    wide = torch.promote_types(asked.queries.dtype, torch.float32)
    own = sum(x.shape[3] * x.element_size() for x in (slots.keys, slots.values))
    return asked.queries[0, 0, ..., 0].numel() * wide.itemsize + own


def _alike(counts: list[int], limit: int) -> list[tuple[slice, int]]:
    """Groups of heads, given their numbers of slots in ascending order, and the most that one of a group has.

    In a group nobody has twice as many as another, and heads times most is at most `limit`, if that leaves one head.
    Heads without slots are left out.
    """
    groups: list[tuple[slice, int]] = []
    start = counts.count(0)
    for end in range(start + 1, len(counts) + 1):
        last = end == len(counts)
        if last or counts[end] >= 2 * counts[start] or (end + 1 - start) * counts[end] > limit:
            groups.append((slice(start, end), counts[end - 1]))
            start = end
    return groups


def _shares(asked: Step, lse: Tensor, slots: Slots) -> Tensor:
    """`[B, H_kv, G, m, S]`: each slot's share of the whole mass that the reference queries see.

    They stand behind all slots and see every one, so that only empty slots are hidden, which the bias does; a place
    without a query has a log-sum-exp of +inf, hence no shares. In memory it is `[B, H_kv, m, G, S]` (see `in_rows`).
    """
    keys, bias = asked.read_keys(slots), asked.bias(slots)
    if kernels.covers(asked.queries, keys):
        from kvrepro.kernels import prefill

        return prefill.shares(asked.queries, keys, lse, bias, asked.scale, asked.softcap).transpose(2, 3)
    wide = torch.promote_types(asked.queries.dtype, torch.float32)
    b, h, g, m, d = asked.queries.shape
    queries = asked.queries.transpose(2, 3).reshape(b * h, m * g, d).to(wide)
    start = lse.transpose(2, 3).reshape(b, h, m * g, 1).to(wide)
    start = (0 if bias is None else bias.to(wide).unsqueeze(2)) - start.expand(b, h, m * g, slots.size)
    start = start.contiguous()
    with tf32(slots.keys.element_size() == 2):  # which numbers of 16 bits pass unrounded
        if asked.softcap is None:
            logits = start.view(b * h, m * g, -1).baddbmm_(queries, keys.flatten(0, 1).to(wide).mT, alpha=asked.scale)
        else:
            found = (queries @ keys.flatten(0, 1).to(wide).mT).mul_(asked.scale / asked.softcap)
            logits = found.tanh_().mul_(asked.softcap).add_(start.view_as(found))
    return logits.exp_().view(b, h, m, g, -1).transpose(2, 3)


def _with_rows(left: Slots, slots: Slots, waiting: Tensor) -> Slots:
    """`left`, with the slots that they had in the rows that wait, `[B, H_kv]` bool."""
    stays = slots.valid & waiting.unsqueeze(-1)
    size = max(left.size, int(stays.sum(dim=2).max()))
    left, had = left.pad(size), compact(slots, stays, size)

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        """Of one side, `[B, H_kv, S]` or `[B, H_kv, S, d]`."""
        return torch.where(waiting.view(*waiting.shape, *[1] * (new.dim() - 2)), old, new)

    sides = {name: chosen(getattr(left, name), getattr(had, name)) for name in _SIDES}
    return dataclasses.replace(
        left, **sides, stats={name: chosen(x, had.stats[name]) for name, x in left.stats.items()}
    )


def _some(asked: Step, size: int) -> Step:
    """`size` of each row's reference queries, spread evenly over those that count, the newest among them."""
    places = asked.query_positions
    m = places.shape[1]
    if m <= size:
        return asked
    count = _counted(places)
    _, rank, empty = _evenly(count, size)
    index = rank + torch.where(rank < count // 2, m // 2 - count // 2, m - count)  # see `_in_halves`
    index = index.clamp(0, m - 1)
    column = index[:, None, None, :, None].expand(*asked.queries.shape[:3], size, asked.queries.shape[4])
    return dataclasses.replace(
        asked,
        queries=asked.queries.gather(3, column),
        query_positions=places.gather(1, index).masked_fill(empty, -1),
    )


def _counted(places: Tensor) -> Tensor:
    """`[B, 1]` int64: how many of the positions `[B, m]` are those of a query."""
    return (places >= 0).sum(dim=1, keepdim=True)


def _evenly(count: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of a row's queries stands in each of `size` places: spread evenly over all, the newest among them.

    Args:
        count: `[B, 1]`, queries that count.
        size: places.

    Returns:
        `[B, size]` each: the place's rank among those that are chosen, in halves (see `_in_halves`), its rank among all
        that count, and that there is none.
    """
    some = count.clamp_max(size)
    rank, empty = _in_halves(some, size)
    return rank, count - 1 - (some - 1 - rank) * count // some.clamp_min(1), empty


def _in_halves(count: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Which of a row's queries stands in each of m places, so that both halves have half of what counts.

    Args:
        count: `[B, 1]`, queries that count, at most m.
        m: places; what is left over is in front of each half.

    Returns:
        `[B, m]` int64, its rank among those that count, and `[B, m]` bool, that there is none.
    """
    column = torch.arange(m, device=count.device)
    first = column < m // 2
    rank = torch.where(first, column - m // 2 + count // 2, column - m + count)
    return rank, rank < torch.where(first, 0, count // 2)


def _turned(step: Step, queries: Tensor, shift: Tensor) -> Tensor:
    """Queries `[B, H_kv, G, m, d]` moved by `shift` positions `[B, m]`."""
    flat = queries.flatten(1, 2)
    return step.rotation.rotate(flat, shift[:, None].expand(flat.shape[:3]).contiguous()).view(queries.shape)


def _squared(error: Tensor) -> Tensor:
    """`[B, H_kv]` float64: the squares of `[B, H_kv, G, m, d]`, summed."""
    return error.double().square().sum(dim=(2, 3, 4))
