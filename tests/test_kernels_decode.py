"""The decoding kernel in Triton's interpreter, against its twin and against float64."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrepro import methods, static
from kvrepro.attention import Step
from kvrepro.methods.base import StepRule
from kvrepro.rope import Rotation
from kvrepro.slots import Slots, uniform

decode = pytest.importorskip("kvrepro.kernels.decode")
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.usefixtures("mended_interpreter")

RULES = {
    "full": StepRule("none"),
    "streaming_llm": StepRule("age", sinks=2, recent=19),
    "h2o": StepRule("mass", recent=5),
    "evicting": StepRule("mean", sinks=1, recent=4),
    "cam": StepRule("age", merge="next", sinks=2, recent=19, targets=4, seed=-3, stream=1),
    "weightedkv": StepRule("mean", merge="right", sinks=1, recent=4),
    "tova": StepRule("last", sinks=1, recent=4),
}
#: Those under which the heads of a row may hold different slots.
APART = [name for name, rule in RULES.items() if rule.score != "last"]
#: Rules and what else the kernel does with the slots: raise logits by log(cardinality), positions by tokens, counting.
APPENDING = {
    "biased": {"biased": True},
    "by tokens": {"biased": True, "by_tokens": True},
    "frozen": {"biased": True, "by_tokens": True, "counting": False},
    "own": {"own": True},
    "own and biased": {"own": True, "biased": True, "by_tokens": True},
}


def storage(
    rule: StepRule,
    *,
    b: int = 2,
    h: int = 2,
    d: int = 64,
    budget: int = 21,
    filled: tuple[int, ...] = (21, 18),
    own: bool = False,
    rooms: Tensor | None = None,
    **more: Any,
) -> static.StaticSlots:
    """Fixed storage whose rows hold `filled` slots with holes in their positions, in float64; `own` biases if asked.

    With `rooms` `[B, H]` a head holds as many as it says, at most, and may hold no more.
    """
    size = max(filled)
    positions = torch.rand(b, h, 3 * size).argsort(dim=2)[..., :size].sort(dim=2).values.int()
    held = torch.tensor(filled)[:b, None].expand(b, h)
    held = held if rooms is None else torch.minimum(held, rooms)
    empty = torch.arange(size) < size - held[..., None]
    slots = Slots(
        keys=torch.randn(b, h, size, d, dtype=torch.float64),
        values=torch.randn(b, h, size, d, dtype=torch.float64),
        positions=positions.masked_fill(empty, -1),
        cardinality=torch.randint(1, 4, (b, h, size), dtype=torch.int32).masked_fill(empty, 0),
        stats={name: torch.rand(b, h, size).masked_fill(empty, 0) for name in static.SIDES},
        dense=False,
        ragged=True,
    )
    rotation = Rotation(100.0 ** -(torch.arange(0, d, 2) / d))
    newest = torch.full((b,), 3 * size + 7, dtype=torch.int32)
    if rule.score == "none":
        budget += 40
        rooms = None if rooms is None else rooms + 40
    budget = budget if rooms is None else rooms.int()
    names = (*static.SIDES[: 3 if own else 2], *(["last"] if rule.score == "last" else []))
    return static.freeze_shape(slots, budget, rule, newest, names, rotation, **more)


def cast(slots: static.StaticSlots, dtype: torch.dtype) -> static.StaticSlots:
    """A copy with keys and values of another type, unused storage poisoned."""
    slots = copy.deepcopy(slots)
    for name in ("keys", "values"):
        x = getattr(slots, name).to(dtype)
        unused = torch.arange(slots.size) >= slots.filled.unsqueeze(-1)
        setattr(slots, name, torch.where(unused.unsqueeze(-1), torch.full_like(x, 1e4), x))
    return slots


def tokens(slots: static.StaticSlots, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random new token: queries `[B, H, G, d]`, key and value `[B, H, d]`."""
    b, h, _, d = slots.keys.shape
    return tuple(torch.randn(b, h, *more, d, dtype=torch.float64) for more in ((group,), (), ()))


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_kernel_keeps_the_same_slots_as_its_twin(name: str, turns: bool) -> None:
    torch.manual_seed(len(name))
    exact = dataclasses.replace(storage(RULES[name]), turns=turns)
    ours, twin = cast(exact, torch.float32), cast(exact, torch.float32)
    b, h, _, d = exact.keys.shape
    windows = torch.full((2, b, h, 3, 5, d), torch.nan)
    for i in range(12):
        new = [x.float() for x in tokens(exact, 3)]
        mine, theirs = ((window, torch.tensor([i % 5])) for window in windows)
        got = decode.step(ours, *new, 0.125, None, mine)
        want = static.step_reference(twin, *new, 0.125, None, theirs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(windows[0, :, :, :, i % 5], new[0])
        torch.testing.assert_close(*windows, rtol=0, atol=0, equal_nan=True)
        ours.newest += 1
        twin.newest += 1
    for field in ("positions", "cardinality", "free", "filled"):
        assert torch.equal(getattr(ours, field), getattr(twin, field)), field
    a, b = static.thaw(ours), static.thaw(twin)
    assert torch.equal(a.positions, b.positions)
    for field in ("keys", "values"):
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-4, atol=1e-5)
    for side in a.stats:
        torch.testing.assert_close(a.stats[side], b.stats[side], rtol=1e-4, atol=1e-5)


ROOMS = torch.tensor([[5, 21], [70, 13]])


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("name", APART)
def test_heads_with_rooms_of_their_own(name: str, turns: bool) -> None:
    """Regions of different lengths, in the kernel and in its twin, and equal ones beside even storage."""
    torch.manual_seed(len(name))
    exact = dataclasses.replace(storage(RULES[name], rooms=ROOMS, own=True, steps=12), turns=turns)
    assert not exact.is_even and exact.nbytes < 0.8 * storage(RULES[name], budget=70, own=True, steps=12).nbytes
    ours, twin = copy.deepcopy(exact), copy.deepcopy(exact)
    for slots in (ours, twin):
        slots.keys, slots.values = slots.keys.float(), slots.values.float()
    equal = torch.full_like(ROOMS, 21)
    torch.manual_seed(5)
    level = storage(RULES[name], rooms=equal, own=True, steps=12)
    torch.manual_seed(5)
    even = storage(RULES[name], own=True)
    for _ in range(12):
        new = tokens(even, 3)
        got, want = (
            f(x, *[y.float() for y in new], 0.125, None) for f, x in ((decode.step, ours), (static.step, twin))
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        same = [static.step_reference(x, *new, 0.125, None) for x in (level, even)]
        torch.testing.assert_close(*same)
        for slots in (ours, twin, level, even):
            slots.newest += 1
    for x, y, tolerance in ((ours, twin, {"rtol": 1e-4, "atol": 1e-5}), (level, even, {})):
        a, b = static.thaw(x), static.thaw(y)
        if RULES[name].score != "none":
            assert bool((a.valid.sum(2) <= x.budget).all())
        for field in ("positions", "cardinality", "keys", "values"):
            torch.testing.assert_close(getattr(a, field), getattr(b, field), **tolerance)
        for side in a.stats:
            torch.testing.assert_close(a.stats[side], b.stats[side], **tolerance)


def test_uneven_storage_gives_back_and_takes_slots() -> None:
    """What comes out is what went in, and what is put back lies in the same tensors."""
    torch.manual_seed(0)
    slots = storage(StepRule("none"), rooms=ROOMS, own=True, steps=3)
    held, keys = static.thaw(slots), slots.keys
    assert held.valid.sum(2).tolist() == [[5, 21], [18, 13]]
    static.refill(slots, dataclasses.replace(held, keys=2 * held.keys), by_tokens=False)
    again = static.thaw(slots)
    assert slots.keys is keys and torch.equal(again.keys, 2 * held.keys) and torch.equal(again.values, held.values)
    assert torch.equal(again.positions, held.positions)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("case", APPENDING)
def test_appending_with_bias_and_positions_by_tokens(case: str, softcap: float | None) -> None:
    """Slots between two compressions: cardinality in logits and positions, attention counted or left alone."""
    torch.manual_seed(7)
    exact = storage(RULES["full"], **APPENDING[case])
    ours, twin = cast(exact, torch.float32), cast(exact, torch.float32)
    for _ in range(6):
        new = [x.float() for x in tokens(exact, 5)]
        got, want = (f(x, *new, 0.125, softcap) for f, x in ((decode.step, ours), (static.step_reference, twin)))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        ours.newest += 1
        twin.newest += 1
    assert torch.equal(ours.filled, exact.filled + 6) and torch.equal(ours.free, ours.filled)
    a, b = static.thaw(ours), static.thaw(twin)
    assert torch.equal(a.positions, b.positions) and torch.equal(a.cardinality, b.cardinality)
    torch.testing.assert_close(a.stats, b.stats, rtol=1e-4, atol=1e-5)
    assert ("bias" in a.stats) == case.startswith("own")
    if case.startswith("own"):  # new tokens have none
        assert bool(a.stats["bias"][..., :-6].any()) and not bool(a.stats["bias"][..., -6:].any())
    old = torch.arange(ours.size) < exact.filled.unsqueeze(-1)
    seen = torch.zeros(()) if case == "frozen" else torch.full((), 6.0)
    torch.testing.assert_close((ours.count - exact.count)[old], seen.expand(int(old.sum())))


@pytest.mark.parametrize("by_tokens", [False, True])
def test_in_cache_positions_are_those_of_the_plain_pass(by_tokens: bool) -> None:
    """The twin turns keys by what `Step.shift` says, for slots before and after a refill."""
    torch.manual_seed(3)
    fixed = storage(RULES["full"], by_tokens=by_tokens)
    for _ in range(2):
        for _ in range(3):
            static.step_reference(fixed, *tokens(fixed, 2), 0.125, None)
            fixed.newest += 1
        slots = static.thaw(fixed)
        plain = Step(
            queries=torch.empty(0), query_positions=fixed.newest[:, None], scale=1.0,
            positions="cardinality" if by_tokens else "cache",
        )  # fmt: skip
        new = Slots(
            keys=torch.zeros(2, 2, 1, 64, dtype=torch.float64),
            values=torch.zeros(2, 2, 1, 64, dtype=torch.float64),
            positions=fixed.newest[:, None, None].expand(2, 2, 1),
            cardinality=torch.ones(2, 2, 1, dtype=torch.int32),
        )
        want = plain.shift(slots.append(new))[..., :-1]
        place = fixed.newest[:, None, None] - (fixed.filled.unsqueeze(-1) - fixed.place) - fixed.positions
        inside = torch.arange(fixed.size) < fixed.filled.unsqueeze(-1)
        assert torch.equal(place[inside], want[slots.valid].int())
        keep = slots.map(lambda x: x[:, :, 5:] if x.dim() > 2 else x)
        static.refill(fixed, keep, by_tokens=by_tokens)
        assert torch.equal(static.thaw(fixed).positions, keep.positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("softcap", "biased"), [(None, False), (2.0, False), (2.0, True)])
@pytest.mark.parametrize(("d", "group", "size"), [(64, 1, 21), (64, 2, 40), (128, 4, 70), (256, 8, 33), (32, 3, 130)])
def test_error_is_at_most_twice_the_twins(
    d: int, group: int, size: int, softcap: float | None, biased: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(d + size)
    exact = storage(RULES["weightedkv"], d=d, budget=size, filled=(size, size - 3), biased=biased)
    new = tokens(exact, group)
    scale = d**-0.5
    low = cast(exact, dtype)
    rounded = [x.to(dtype) for x in new]
    truth = cast(low, torch.float64)
    want = static.step_reference(truth, *(x.double() for x in rounded), scale, softcap)
    twin = copy.deepcopy(low)
    theirs = static.step_reference(twin, *rounded, scale, softcap)
    ours = decode.step(low, *rounded, scale, softcap)
    # One unit in the last place of the output's type is granted: a lucky twin must not fail the kernel.
    grain = torch.finfo(dtype).eps * float(want.abs().mean())
    assert ours.dtype == dtype and torch.isfinite(ours).all()
    assert float((ours - want).norm()) <= 2 * float((theirs - want).norm()) + grain
    mass = [float((x.mass - truth.mass).norm()) for x in (low, twin)]
    assert mass[0] <= 2 * mass[1] + 1e-5


def test_new_token_is_written_and_the_rest_untouched() -> None:
    slots = cast(storage(RULES["h2o"]), torch.float32)
    before = slots.keys.clone()
    free = slots.free.clone().long()
    new = [x.float() for x in tokens(slots, 2)]
    decode.step(slots, *new, 0.1, None)
    written = slots.keys.gather(2, free[..., None, None].expand(-1, -1, 1, 64)).squeeze(2)
    assert torch.equal(written, new[1])
    others = torch.arange(slots.size) != free.unsqueeze(-1)
    assert torch.equal(slots.keys[others], before[others])


@pytest.mark.parametrize("splits", [1, 3, 64])
def test_any_number_of_splits_gives_the_same(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(splits)
    monkeypatch.setitem(decode.CONFIG, "splits", splits)
    monkeypatch.setitem(decode.CONFIG, "tile", 16)
    monkeypatch.setitem(decode.CONFIG, "settle_tile", 32)
    exact = storage(RULES["weightedkv"], budget=150, filled=(150, 149))
    ours, twin = cast(exact, torch.float32), cast(exact, torch.float32)
    for _ in range(3):
        new = [x.float() for x in tokens(exact, 3)]
        got, want = (f(x, *new, 0.1, None) for f, x in ((decode.step, ours), (static.step_reference, twin)))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.place[..., :1], twin.place[..., :1]) and torch.equal(ours.free, twin.free)


# --- CaM's draws and shares ------------------------------------------------------------------------------------------


@triton.jit
def _draws(position_ptr, out_ptr, heads, seed, stream, layer, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """`[heads, BLOCK]` draws."""
    head, index = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    draw = decode._uniform(seed, stream, layer, head % heads, tl.load(position_ptr + index))
    tl.store(out_ptr + head * BLOCK + index, draw)


@pytest.mark.parametrize(
    ("seed", "stream", "layer"), [(0, 1, 0), (7, 1, 31), (-3, 2, 5), (2**31 + 11, 0, 4), (2**40, 1, 1)]
)
def test_draws_are_the_same_bit_for_bit(seed: int, stream: int, layer: int) -> None:
    position = torch.randint(0, 2**31 - 1, (512,), dtype=torch.int32)
    out = torch.empty(6, 512)
    _draws[(6,)](position, out, 6, decode._signed(seed), stream, layer, BLOCK=512)
    assert torch.equal(out, uniform(seed, layer, torch.arange(6)[:, None], position, stream))


SHARING = dataclasses.replace(RULES["cam"], sinks=3, targets=6, seed=9)


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rooms", [None, ROOMS + 5], ids=["even", "uneven"])
def test_shares_of_a_leaving_value(rooms: Tensor | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws and sums as the twin's in every type, with slots and targets in several tiles."""
    for name, size in (("pass_tile", 4), ("scan_tile", 16), ("settle_tile", 16)):
        monkeypatch.setitem(decode.CONFIG, name, size)
    torch.manual_seed(4)
    exact = storage(SHARING, rooms=rooms, steps=14, layer=2)
    ours, twin = copy.deepcopy(exact), copy.deepcopy(exact)
    for slots in (ours, twin):
        slots.keys, slots.values = slots.keys.to(dtype), slots.values.to(dtype)
    new = storage(SHARING)
    for _ in range(14):
        token = [x.to(dtype) for x in tokens(new, 2)]
        for step, slots in ((decode.step, ours), (static.step_reference, twin)):
            step(slots, *token, 0.125, None)
            slots.newest += 1
    a, b = static.thaw(ours), static.thaw(twin)
    assert torch.equal(a.positions, b.positions) and torch.equal(a.cardinality, b.cardinality)
    # The interpreter cuts bfloat16 off where it should round; a share is a sixth of a value of about 1.
    cut = {"rtol": 0.03, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(a.values, b.values, **cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [1, 6, 40])
def test_one_slot_leaves_as_cam_compresses(targets: int, dtype: torch.dtype) -> None:
    """The same slots give their values away as in `CaM.compress`; the values are equal but for rounding."""
    torch.manual_seed(targets)
    method = methods.create("cam", sinks=2, targets=targets, seed=5)
    fixed = storage(method.step_rule(21), b=1, h=40, filled=(21,), layer=3)
    fixed.keys, fixed.values = fixed.keys.to(dtype), fixed.values.to(dtype)
    static._write(fixed, *(x.to(dtype) for x in tokens(fixed, 1)[1:]))
    fixed.mass[:] = torch.rand(fixed.mass.shape)
    step = Step(queries=torch.empty(0), query_positions=fixed.newest[:, None], scale=1.0, layer=3)
    old = fixed.values.clone()
    want = method.compress(static.full(copy.deepcopy(fixed)), 21, step)
    static._settle(fixed, torch.ones_like(fixed.place, dtype=torch.bool))
    got = static.thaw(fixed)
    for name in ("positions", "cardinality", "keys"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.stats["mass"], want.stats["mass"])
    torch.testing.assert_close(got.values, want.values, rtol=torch.finfo(dtype).eps, atol=2e-7)
    gave = (got.values != old[:, :, [0, 1, *range(3, 22)]]).any(dim=3)
    assert 0 < int(gave[..., 2].sum()) < 40  # some did, and some did not
    assert torch.equal(gave.sum(dim=2), gave[..., 2] * min(targets, 19))


@pytest.mark.parametrize("sizes", [{}, {"scan_tile": 16, "settle_tile": 16}], ids=["one tile", "several"])
@pytest.mark.parametrize("rule", [RULES["tova"], StepRule("none")], ids=["evicting", "appending"])
def test_attention_averaged_over_the_heads_of_a_layer(
    rule: StepRule, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four heads of each row agree on what leaves, in the kernel and in its twin, while rows fill up, too."""
    for name, size in sizes.items():
        monkeypatch.setitem(decode.CONFIG, name, size)
    torch.manual_seed(11)
    exact = storage(RULES["tova"], h=4, budget=40, filled=(40, 37))
    exact = dataclasses.replace(exact, rule=rule, budget=exact.budget + (20 if rule.score == "none" else 0))
    if rule.score == "none":
        held = static.thaw(exact)
        exact = static.freeze_shape(held, 60, rule, exact.newest, ("last", "bias"), None)
    ours, twin = cast(exact, torch.float32), cast(exact, torch.float32)
    for _ in range(14):
        new = [x.float() for x in tokens(exact, 2)]
        got, want = (f(x, *new, 0.125, None) for f, x in ((decode.step, ours), (static.step_reference, twin)))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*(torch.where(x.place >= 0, x.last, 0) for x in (ours, twin)), rtol=1e-4, atol=1e-6)
        for x in (ours, twin):
            assert bool((x.last == x.last[:, :1]).all()) and bool((x.place == x.place[:, :1]).all())
            x.newest += 1
        assert torch.equal(ours.free, twin.free) and torch.equal(ours.place, twin.place)
    assert torch.equal(static.thaw(ours).positions, static.thaw(twin).positions)
    assert int(ours.done.abs().sum()) == 0


def test_one_slot_leaves_as_tova_compresses() -> None:
    """The same slot, and of equal scores the same one."""
    method = methods.create("tova", sinks=1)
    fixed = storage(method.step_rule(21), b=1, h=3, filled=(21,))
    static._write(fixed, *tokens(fixed, 1)[1:])
    fixed.last[:] = torch.randint(0, 5, (22,))
    step = Step(queries=torch.empty(0), query_positions=fixed.newest[:, None], scale=1.0)
    want = method.compress(static.full(copy.deepcopy(fixed)), 21, step)
    static._settle(fixed, torch.ones_like(fixed.place, dtype=torch.bool))
    got = static.thaw(fixed)
    for name in ("positions", "cardinality", "keys", "values"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
