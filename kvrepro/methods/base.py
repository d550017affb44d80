"""What a method is: a frozen dataclass of options that say where they come from, and pure functions of tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvrepro.attention import Step
from kvrepro.slots import Slots

#: Where a slot's rotary position can come from.
POSITIONS = ("original", "cache", "cardinality")


def option(default: Any, source: str, choices: tuple[Any, ...] = ()) -> Any:
    """A method's option: a dataclass field that knows where its default comes from.

    Args:
        default: the default.
        source: "paper: ...", "code: ...", "second-hand: ..." or "ours: ..." with the place or the reason.
        choices: the valid values, where they can be listed.

    Returns:
        A dataclass field.
    """
    return dataclasses.field(default=default, metadata={"source": source, "choices": choices})


@dataclass(frozen=True)
class Option:
    """An option of a method, for people: name, default, source, and choices where they can be listed."""

    name: str
    default: Any
    source: str
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Description:
    """What a method is, for people."""

    name: str
    title: str
    kind: str
    paper: str
    url: str
    summary: str
    options: tuple[Option, ...]

    def __str__(self) -> str:
        """A card: title, paper, and one line an option."""
        lines = [f"{self.name}: {self.title} ({self.kind})", f"  {self.paper} {self.url}".rstrip(), f"  {self.summary}"]
        for o in self.options:
            choices = f" of {list(o.choices)}" if o.choices else ""
            lines.append(f"  {o.name} = {o.default!r}{choices}  [{o.source}]")
        return "\n".join(lines)


@dataclass(frozen=True)
class StepRule:
    """How a method lets one slot go for each token that comes, so that decoding can work in place (`static`).

    Attributes:
        score: the slot with the lowest one leaves: `"age"` (the oldest), `"mass"` (attention received), `"mean"` (the
            same over the queries that saw it), `"last"` (the newest query's attention, averaged over all query heads of
            the layer, whose heads must hold the same slots), or `"none"` (nothing ever leaves).
        merge: what becomes of the value that leaves: `""` (it goes too), `"right"` (it joins its right neighbour's,
            weighted by mean attention: WeightedKV, Alg. 1), or `"next"` (a share of it is added to each of the next
            slots' or to none, at random: CaM).
        sinks: first slots that stay.
        recent: last slots that stay.
        targets: slots that `"next"` adds to.
        seed: seed of its draws (`slots.uniform`).
        stream: their stream.
    """

    score: str
    merge: str = ""
    sinks: int = 0
    recent: int = 1
    targets: int = 0
    seed: int = 0
    stream: int = 0


@dataclass(frozen=True)
class Method:
    """Base of all methods: what the cache asks of one.

    A method sees one layer at a time: slots in chronological order, `[B, H_kv, S, ...]`, and the forward pass that
    just attended to them. It knows nothing of transformers.

    Class attributes:
        name, title, kind ("baseline", "eviction" or "merging"), paper, url: for people.
        statistics: attention statistics it needs of each pass ("mass", "last").
        accumulates: side vectors the cache starts at 0 for each new token; `"bias"` is added to the slot's logit.
        cardinality_bias: attention adds log(cardinality) to a slot's logit.
        unlimited: never compresses.
        counts_passes: what it keeps depends on how many passes read the tokens, not only on the tokens.
        observes: `compress` lets queries look at the slots once more (`attention.observe`).
        needs_rotation: works on keys before rotary embedding, so it needs the model's rotation in any case.
        whole_numbers: options that count slots and must be whole numbers (or None).
        builds_on: options that may name another method, whose code then counts as this one's too (see `fingerprint`).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str] = ""
    url: ClassVar[str] = ""
    statistics: ClassVar[tuple[str, ...]] = ()
    accumulates: ClassVar[tuple[str, ...]] = ()
    cardinality_bias: ClassVar[bool] = False
    unlimited: ClassVar[bool] = False
    counts_passes: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    needs_rotation: ClassVar[bool] = False
    whole_numbers: ClassVar[tuple[str, ...]] = ("sinks", "recent")
    builds_on: ClassVar[tuple[str, ...]] = ()

    sinks: int = option(0, "ours: none")
    recent: int | None = option(None, "ours: none")
    positions: str = option("original", "ours: as the model numbered the tokens", POSITIONS)
    seed: int = option(0, "ours")

    def __post_init__(self) -> None:
        """Check the options' values.

        Raises:
            ValueError: a value is not valid; says which ones are.
        """
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and not any(value is c or (value == c and type(value) is type(c)) for c in choices):
                raise ValueError(f"{self.name}: {f.name}={value!r} is not valid; choose one of {list(choices)}")
        for name in self.whole_numbers:
            self.require_whole(name, 0)
        if not isinstance(self.seed, int):
            raise ValueError(f"{self.name}: seed={self.seed!r} is not valid; give a whole number")

    def require_whole(self, name: str, least: int) -> None:
        """Check that an option is None or a whole number of at least `least`.

        Raises:
            ValueError: it is not.
        """
        value = getattr(self, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{self.name}: {name}={value!r} is not valid; give a whole number, {least} or more")

    def require_number(self, name: str, low: float, high: float) -> None:
        """Check that an option is a number in [low, high].

        Raises:
            ValueError: it is not.
        """
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{self.name}: {name}={value!r} is not valid; give a number from {low} to {high}")

    def resolved(self) -> dict[str, Any]:
        """All options with their values, for records."""
        return dataclasses.asdict(self)

    @property
    def bounded(self) -> bool:
        """Whether the slots are held to the budget."""
        return True

    @property
    def replayable(self) -> bool:
        """Whether one pass over a prompt is all that compressing it takes; else `prefill` must drive the model."""
        return True

    def reads_twice(self, arrived: int, budget: int) -> bool:
        """Whether `arrived` tokens that overflow a layer are read again, behind themselves, before it compresses.

        `prefill` sees to it; `compress` then finds the second pass as `step.again`.
        """
        return False

    @property
    def shares_layers(self) -> bool:
        """Whether what a layer, or a head, may hold depends on what all layers attend to (see `split`)."""
        return False

    @property
    def shares_heads(self) -> bool:
        """Whether heads come to hold different numbers of slots (see `split`)."""
        return False

    def shares_at(self, arrived: int) -> bool:
        """Whether a pass of so many tokens is one at which slots are shared out, if none was before."""
        return self.shares_layers

    @property
    def sums(self) -> bool:
        """Whether `static.step` can do what `accumulate` does: add up attention and queries as `Method`'s, and no more.

        Or it notes in `"last"` the newest query's attention, averaged over all query heads of the layer.
        """
        return type(self).accumulate is Method.accumulate

    def sinks_of(self, budget: int) -> int:
        """Number of first slots that are always kept, given the layer's budget."""
        return self.sinks

    def recent_of(self, budget: int) -> int:
        """Number of last slots that are always kept, given the layer's budget."""
        return self.recent or 0

    def window_of(self, budget: int) -> int:
        """Number of last queries whose attention decides; 0 for methods without an observation window."""
        return 0

    def resolve(self, budget: int) -> Method:
        """This method with the options that depend on the mean budget over layers filled in."""
        return self

    def check(self, budget: int) -> None:
        """Check that a layer of `budget` slots leaves the method room to choose.

        Raises:
            ValueError: fewer than sinks + recent + 1 slots.
        """
        need = self.sinks_of(budget) + self.recent_of(budget) + 1
        if budget < need:
            raise ValueError(
                f"{self.name}: a budget of {budget} slots is below sinks + recent + 1 = {need}; "
                f"raise the budget, or lower sinks ({self.sinks_of(budget)}) or recent ({self.recent_of(budget)})"
            )

    def layer_budget(self, budget: int, layer: int, layers: int) -> int | None:
        """The slots of one layer, given the mean over layers; None leaves the layer whole."""
        return budget

    def waiting(self, slots: Slots, budget: int, step: Step) -> Step:
        """What a layer keeps of the pass until the last one has attended, where slots are shared out (`split`).

        Args:
            slots: the layer's slots, before the first compression.
            budget: mean slots a head and layer.
            step: the pass.
        """
        return step

    def split(self, layers: list[Slots], steps: list[Step], budget: int) -> list[int] | list[Tensor]:
        """Share slots out among layers, once a cache, or among heads, for each row once it overflows.

        Args:
            layers: the slots of the layers, before the first compression.
            steps: what `waiting` kept of the pass, a layer each.
            budget: mean slots a head and layer.

        Returns:
            What each layer may hold: slots of every head, or `[B, H_kv]` int32, those of each one (`Step.rooms`).
        """
        return [budget] * len(layers)

    def due(self, size: int, budget: int, arrived: int, since: int) -> bool:
        """Whether to compress now.

        Args:
            size: slots a head holds.
            budget: slots it may hold.
            arrived: tokens of this pass.
            since: tokens that have arrived since the last compression.
        """
        return size > budget

    def initial_state(self, slots: Slots) -> dict[str, Tensor]:
        """What `slots.state` holds before the first compression, for methods that keep one."""
        return {}

    def step_rule(self, budget: int) -> StepRule | None:
        """How one slot goes for each token while decoding; None where `compress` has more to do than that."""
        return None

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """Whether reading `arrived` tokens is always the same work for a full layer: then a CUDA graph can hold it.

        True promises that `compress` makes `budget` slots of `budget + arrived` whatever they hold, and decides nothing
        on the host: no `int(tensor)`, no shape that depends on values. False is always right, and slower on a GPU.
        """
        return False

    def leaves(self, budget: int) -> int | None:
        """Slots that `compress` leaves while decoding, if that is always the same work: then a CUDA graph can hold it.

        For methods that are due now and then. A number promises that `compress` after one token a row makes so many
        new slots of `budget + 1` whatever they hold, none of them empty, changes no `state`, and decides nothing on the
        host (see `steady`). Heads with `rooms` of their own lose as many each. `compress` is told by `Step.one_over`.
        None is always right, and slower on a GPU.
        """
        return None

    def accumulate(self, slots: Slots, found: dict[str, Tensor], step: Step) -> Slots:
        """Add this pass's attention statistics to the side vectors.

        Args:
            slots: the slots the pass attended to.
            found: the statistics, each `[B, H_kv, G, S]`.
            step: the pass.

        Returns:
            Slots with new side vectors: `"mass"` grows by the attention each slot received, summed over the pass's
            queries and averaged over the query heads of a group; `"count"` by the number of queries that saw it.
        """
        stats = dict(slots.stats)
        if "mass" in stats:
            stats["mass"] = stats["mass"] + self.reduce_group(found["mass"]).float()
        if "count" in stats:
            stats["count"] = stats["count"] + queries_that_saw(slots, step)
        return dataclasses.replace(slots, stats=stats)

    def reduce_group(self, mass: Tensor) -> Tensor:
        """From one number a query head to one a KV head: `[B, H_kv, G, S]` -> `[B, H_kv, S]`, the mean over G."""
        return mass.mean(dim=2)

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Reduce the slots to at most `budget` a head.

        Args:
            slots: more than `budget` slots a head, in chronological order, the pass's own tokens last.
            budget: slots a head may keep.
            step: the pass that made the cache overflow.

        Returns:
            The new slots, in chronological order.
        """
        raise NotImplementedError


def queries_that_saw(slots: Slots, step: Step) -> Tensor:
    """`[B, H_kv, S]` float32: how many of the pass's queries could attend to each slot."""
    last = step.query_positions.amax(dim=1)[:, None, None]
    asked = (step.query_positions >= 0).sum(dim=1)[:, None, None]
    seen = last - torch.maximum(slots.positions, last - asked + 1) + 1
    return seen.masked_fill(~slots.valid, 0).float()
