"""Decoding in fixed storage against plain `model.generate`, and perplexity token by token against the plain loop."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny import FAMILIES, VOCABULARY, tiny_model, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import kvrepro
from kvrepro import decode, memory, methods
from kvrepro.adapter import cache_arguments
from kvrepro.attention import Step
from kvrepro.cache import CompressedCache
from kvrepro.methods.base import Method
from kvrepro.slots import Slots, compact, select

#: Prompt of the longer row; the shorter one has 8 tokens of padding.
LENGTH, NEW = 22, 14
#: Every method, and the options that change how its steps are taken: (options, budget, how the layers end up).
CASES: dict[str, tuple[str, dict[str, Any], int | float | None, str]] = {
    "full": ("full", {}, None, "in place"),
    "streaming": ("streaming_llm", {}, 16, "in place"),
    "streaming recent": ("streaming_llm", {"recent": 6}, 16, "appended"),
    "streaming cardinality": ("streaming_llm", {"positions": "cardinality"}, 16, "copied back"),
    "h2o": ("h2o", {}, 16, "in place"),
    "h2o cache": ("h2o", {"positions": "cache", "sinks": 2}, 0.7, "in place"),
    "h2o greedy": ("h2o", {"recent": 0}, 16, "in place"),
    "tova": ("tova", {}, 16, "in place"),
    "tova sinks": ("tova", {"sinks": 2, "recent": 3, "positions": "cache"}, 16, "in place"),
    "tova counting tokens": ("tova", {"positions": "cardinality"}, 16, "copied back"),
    "snapkv": ("snapkv", {"kernel": 3}, 16, "copied back"),
    "pyramidkv": ("pyramidkv", {"window": 4, "kernel": 3}, 16, ""),
    "keydiff": ("keydiff", {}, 16, "copied back"),
    "random": ("random", {"sinks": 1, "recent": 2}, 16, "copied back"),
    "cam": ("cam", {"targets": 3}, 16, "in place"),
    "cam many": ("cam", {"targets": 40, "seed": 5, "positions": "original"}, 16, "in place"),
    "cam cardinality": ("cam", {"targets": 3, "positions": "cardinality"}, 16, "copied back"),
    "cam recent": ("cam", {"targets": 3, "recent": 7}, 16, "appended"),
    "d2o": ("d2o", {}, 16, ""),
    "d2o variance": ("d2o", {"layer_budgets": "variance", "sinks": 1, "recent": 2}, 16, ""),
    "d2o whole": ("d2o", {"whole_layers": True}, 16, ""),
    "keepkv": ("keepkv", {"threshold": 0.3}, 16, ""),
    "asymkv": ("asymkv", {"fisher": "forward"}, 16, ""),
    "asymkv loss": ("asymkv", {}, 16, ""),
    "asymkv blocks": ("asymkv", {"fisher": "forward", "block": 3}, 16, "appended"),
    "weightedkv": ("weightedkv", {}, 16, "in place"),
    "weightedkv original": ("weightedkv", {"positions": "original", "recent": 3, "sinks": 1}, 16, "in place"),
    "weightedkv cardinality": ("weightedkv", {"positions": "cardinality"}, 16, "copied back"),
    "weightedkv evicting": ("weightedkv", {"merge": False}, 16, "in place"),
    "kvmerger": ("kvmerger", {"block": 4}, 16, "appended"),
    "kvmerger mass": ("kvmerger", {"mass": "attention", "reduce": "max", "block": 3}, 16, "appended"),
    "kvmerger cardinality": ("kvmerger", {"positions": "cardinality", "reduce": "sum", "block": 5}, 16, "appended"),
    "kvmerger threshold": ("kvmerger", {"budget_mode": "threshold", "block": 5, "epsilon": 0.1}, 16, "appended"),
    "kvmerger skipping": ("kvmerger", {"skip_layers": True, "block": 4}, 16, ""),
    "kvslimmer": ("kvslimmer", {}, 16, ""),
    "kvslimmer blocks": ("kvslimmer", {"block": 3, "overlap": "released"}, 16, "appended"),
    "kvslimmer released": ("kvslimmer", {"variant": "released"}, 16, ""),
    "attention matching": ("attention_matching", {}, 16, ""),
    "attention matching same": ("attention_matching", {"heads": "same"}, 16, ""),
    "attention matching blocks": ("attention_matching", {"block": 4, "sinks": 1, "window": 6}, 16, "appended"),
    "attention matching of h2o": ("attention_matching", {"keys": "h2o", "block": 4}, 16, "appended"),
    "attention matching of tova": ("attention_matching", {"keys": "tova", "block": 4}, 16, "appended"),
    "attention matching of kvslimmer": ("attention_matching", {"keys": "kvslimmer", "window": 3}, 16, "appended"),
    "attention matching gaussian": (
        "attention_matching",
        {"block": 3, "queries": "gaussian", "count": 9},
        16,
        "appended",
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore:asymkv")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """One small model for all tests here."""
    return kvrepro.prepare(tiny_model())


def padded(length: int = LENGTH, short: int = 8) -> tuple[Tensor, Tensor]:
    """Two rows, the second one padded on the left: ids and attention mask."""
    ids = tokens(2, length, seed=3)
    mask = torch.ones_like(ids)
    ids[1, :short], mask[1, :short] = 0, 0
    return ids, mask


def plain(model: PreTrainedModel, cache: CompressedCache, ids: Tensor, mask: Tensor, new: int, **more: Any) -> Tensor:
    """What transformers writes; AsymKV's loss gradient needs `prefill` for the prompt."""
    cache.plan(ids.shape[1])
    if getattr(cache.method, "fisher", "") == "loss":
        first = kvrepro.prefill(model, ids, cache, attention_mask=mask).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask, new = torch.cat([ids, first], 1), torch.nn.functional.pad(mask, (0, 1), value=1), new - 1
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, **more
    )


def trimmed(x: Tensor, empty: int) -> Tensor:
    """Slots `[B, H, S(, d)]` without the first `empty`."""
    return x[:, :, empty:]


def assert_same_cache(ours: CompressedCache, theirs: CompressedCache) -> None:
    """Keys, values, positions, cardinalities, side vectors, windows and counts of tokens agree in every layer."""
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.compressed, theirs.compressed, strict=True):
        assert a.static is None and a.slots.size <= b.slots.size
        extra = b.slots.size - a.slots.size  # slots that are empty in all rows may have gone
        assert not bool(trimmed(b.slots.valid, 0)[:, :, :extra].any())
        for name in ("positions", "cardinality"):
            assert torch.equal(getattr(a, name), trimmed(getattr(b, name), extra)), name
        pairs = [(getattr(a, n), trimmed(getattr(b, n), extra), a.slots.valid) for n in ("keys", "values")]
        assert set(a.slots.stats) == set(b.slots.stats) and set(b.slots.state) <= set(a.slots.state)
        pairs += [(a.slots.stats[n], trimmed(x, extra), a.slots.valid) for n, x in b.slots.stats.items()]
        pairs += [(a.slots.state[n], x, torch.ones_like(x, dtype=torch.bool)) for n, x in b.slots.state.items()]
        for x, y, where in pairs:
            torch.testing.assert_close(x[where], y[where], rtol=1e-5, atol=1e-6, equal_nan=True)
        assert torch.equal(a.row_tokens, b.row_tokens)
        assert (a.window is None) == (b.window is None)
        for x, y in zip(a.window or (), b.window or (), strict=True):
            torch.testing.assert_close(x, y)


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [LENGTH, 10], ids=["full", "filling"])
@pytest.mark.parametrize("case", CASES)
def test_generate_writes_what_plain_generate_writes(model: PreTrainedModel, case: str, length: int) -> None:
    """Same tokens and same cache, with padding; the budget smaller than the prompt, or reached while decoding."""
    name, options, budget, _ = CASES[case]
    ids, mask = padded(length, 4 if length == 10 else 8)
    caches = [kvrepro.make_cache(model, name, budget, **options) for _ in range(2)]
    ours = kvrepro.generate(model, ids, caches[0], NEW, attention_mask=mask)
    theirs = plain(model, caches[1], ids, mask, NEW)
    assert torch.equal(ours, theirs)
    assert_same_cache(*caches)
    assert 0 < caches[0].nbytes <= caches[1].nbytes


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][3]])
def test_layers_take_their_steps_as_expected(model: PreTrainedModel, case: str) -> None:
    """The way each method's full layers are stepped: a regression here is slow, not wrong."""
    name, options, budget, mode = CASES[case]
    ids, mask = padded()
    cache = kvrepro.make_cache(model, name, budget, **options)
    kvrepro.prefill(model, ids, cache, attention_mask=mask)
    with decode.Decoder(model, cache, room=3) as decoder:
        assert decoder.modes == [mode] * 3


def test_a_layer_that_becomes_full_changes_its_ways(model: PreTrainedModel) -> None:
    """Random eviction appends until it is full, then compresses at every step; KVMerger goes on appending."""
    ids, mask = padded(10, 2)
    filling = {"random": "copied back", "snapkv": "copied back", "kvmerger": "appended"}
    for name, modes in ((name, ["appended", last]) for name, last in filling.items()):
        cache = kvrepro.make_cache(model, name, 16)
        first = kvrepro.prefill(model, ids, cache, attention_mask=mask).logits[:, -1].argmax(-1)
        with decode.Decoder(model, cache, room=9) as decoder:
            found = {decoder.modes[0]: None}
            decoder.run(lambda decoder=decoder, first=first: decoder.logits(first), 9)
            assert [*found, decoder.modes[0]] == modes
        assert cache.get_seq_length() == 19 and cache.compressed[0].slots.size <= 16


@pytest.mark.parametrize("name", ["weightedkv", "kvmerger", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_in_every_family(family: str, name: str) -> None:
    """Caps on logits, normalised queries, and sliding-window layers, which step plainly."""
    model = kvrepro.prepare(tiny_model(family))
    ids, mask = padded()
    caches = [kvrepro.make_cache(model, name, 16) for _ in range(2)]
    ours = kvrepro.generate(model, ids, caches[0], NEW, attention_mask=mask)
    assert torch.equal(ours, plain(model, caches[1], ids, mask, NEW))
    assert_same_cache(*caches)


@pytest.mark.parametrize("name", ["weightedkv", "h2o", "cam", "kvmerger", "tova"])
def test_capped_logits_in_fixed_storage(name: str) -> None:
    """Gemma 2 without sliding layers: the cap goes through every way of stepping."""
    model = kvrepro.prepare(tiny_model("gemma2", layer_types=["full_attention"] * 3))
    ids, mask = padded()
    caches = [kvrepro.make_cache(model, name, 16) for _ in range(2)]
    ours = kvrepro.generate(model, ids, caches[0], NEW, attention_mask=mask)
    assert torch.equal(ours, plain(model, caches[1], ids, mask, NEW))
    assert_same_cache(*caches)


@pytest.mark.parametrize("name", ["kvslimmer", "keepkv", "weightedkv", "kvmerger"])
def test_a_frozen_cache_is_appended_to(model: PreTrainedModel, name: str) -> None:
    """After `freeze` nothing is counted or compressed; cardinalities stay in the logits and in the positions."""
    ids = tokens(2, 30)
    options = {"mass": "attention", "positions": "cardinality"} if name == "kvmerger" else {}
    caches = [kvrepro.make_cache(model, name, 16, **options) for _ in range(2)]
    for cache in caches:
        kvrepro.prefill(model, ids[:, :22], cache, chunk=3)
        cache.freeze()
    assert int(caches[0].compressed[0].cardinality.max()) > 1
    found = []
    with decode.Decoder(model, caches[0], room=8) as decoder:
        assert decoder.modes == ["in place"] * 3
        steps = iter(range(22, 30))
        decoder.run(lambda: found.append(decoder.logits(ids[:, next(steps)])), 8)
    with torch.no_grad():
        more = [model(ids[:, t : t + 1], **cache_arguments(model, caches[1])).logits for t in range(22, 30)]
    torch.testing.assert_close(torch.stack(found, dim=1), torch.cat(more, dim=1))
    assert_same_cache(*caches)


def test_prompt_in_chunks_and_a_second_reading(model: PreTrainedModel) -> None:
    """Padding is not counted wherever the prompt is cut, and a cache that was decoded into can be read into."""
    ids, mask = padded()
    outs = []
    for sizes in ([22], [5, 17], [11, 11]):
        cache = kvrepro.make_cache(model, "full")
        start = 0
        for n in sizes[:-1]:
            kvrepro.prefill(model, ids[:, start : start + n], cache, attention_mask=mask[:, start : start + n])
            start += n
        outs.append(kvrepro.generate(model, ids[:, start:], cache, 6, attention_mask=mask[:, start:], chunk=4)[:, -6:])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    more = kvrepro.prefill(model, outs[0][:, -1:], cache, attention_mask=torch.ones(2, 1)).logits[:, -1]
    fresh, every = torch.cat([ids, outs[0]], 1), torch.nn.functional.pad(mask, (0, 6), value=1)
    whole = kvrepro.prefill(model, fresh, kvrepro.make_cache(model, "full"), attention_mask=every).logits[:, -1]
    torch.testing.assert_close(more, whole)


def test_rows_end_at_their_own_token(model: PreTrainedModel) -> None:
    """What follows an end repeats it; writing stops when all rows have ended, as plain generate's does."""
    ids, mask = padded()
    free = kvrepro.generate(model, ids, kvrepro.make_cache(model, "h2o", 16), NEW, attention_mask=mask)[:, LENGTH:]
    early, late = int(free[0, 2]), int(free[1, 6])
    for ends in (early, [early, late], [early, int(free[1, 0])], int(free[0, 0])):
        caches = [kvrepro.make_cache(model, "h2o", 16) for _ in range(2)]
        ours = kvrepro.generate(model, ids, caches[0], NEW, attention_mask=mask, eos_token_id=ends)
        theirs = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=caches[1],
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=VOCABULARY - 1,
        )
        new = theirs[:, LENGTH:].clone()
        wanted = torch.tensor([ends] if isinstance(ends, int) else ends)
        for row in new:
            at = torch.isin(row, wanted).nonzero()
            if len(at):
                row[int(at[0]) :] = row[int(at[0])]
        assert torch.equal(ours[:, LENGTH:], new)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == ours.shape[1] - 1


def test_temperature_draws_from_the_softmax() -> None:
    """Draws follow softmax(logits / t): chi-squared over 5 outcomes stays below its 99.99 % point; 0 is greedy."""
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]).expand(20000, 5)
    for temperature in (0.5, 1.0, 3.0):
        p = torch.softmax(logits[0] / temperature, -1)
        counts = torch.bincount(decode._pick(logits, temperature), minlength=5)
        assert float(((counts - 20000 * p).square() / (20000 * p)).sum()) < 23.5
    assert torch.equal(decode._pick(logits, 0.0), torch.full((20000,), 3))


def test_temperature_depends_on_the_seed_alone(model: PreTrainedModel) -> None:
    ids, mask = padded()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        cache = kvrepro.make_cache(model, "weightedkv", 16)
        outs.append(kvrepro.generate(model, ids, cache, NEW, attention_mask=mask, temperature=5.0))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_one_new_token_needs_no_step(model: PreTrainedModel) -> None:
    ids, mask = padded()
    cache = kvrepro.make_cache(model, "h2o", 16)
    out = kvrepro.generate(model, ids, cache, 1, attention_mask=mask)
    assert out.shape == (2, LENGTH + 1) and cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"max_new_tokens": 3, "temperature": -0.1}])
def test_generate_refuses(model: PreTrainedModel, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        kvrepro.generate(model, tokens(1, 9), kvrepro.make_cache(model, "full"), **wrong)


def test_decoder_says_what_is_wrong(model: PreTrainedModel) -> None:
    """An empty cache; more steps than there is room for; the cache is given back after an error."""
    cache = kvrepro.make_cache(model, "weightedkv", 16)
    with pytest.raises(ValueError, match="read the prompt first"):
        decode.Decoder(model, cache, room=4)
    kvrepro.prefill(model, tokens(1, 9), cache)
    token = torch.ones(1, dtype=torch.long)
    with (
        pytest.raises(ValueError, match=r"2 \+ 3 steps, but room=4"),
        decode.Decoder(model, cache, room=4) as decoder,
    ):
        assert cache.compressed[0].keys.shape == (1, 2, 9, 8)
        decoder.run(lambda: decoder.logits(token), 2)
        assert cache.compressed[0].positions[0, 0].tolist() == list(range(11))
        decoder.run(lambda: decoder.logits(token), 3)
    assert cache.get_seq_length() == 11 and cache.compressed[0].slots.size == 11


def test_a_subclass_that_compresses_otherwise_does_not_inherit_the_rule(model: PreTrainedModel) -> None:
    """WeightedKV's rule stands for WeightedKV's `compress` only."""

    class Newest(methods.get("weightedkv")):
        name = "newest"

        def compress(self, slots: Any, budget: int, step: Any) -> Any:
            return slots.map(lambda x: x[:, :, -budget:] if x.dim() > 2 else x)

    cache = kvrepro.make_cache(model, "weightedkv", 16)
    for layer in cache.compressed:
        layer.method = Newest()
    ids = tokens(1, 20)
    kvrepro.generate(model, ids, cache, 5)
    assert cache.compressed[0].positions[0, 0].tolist() == list(range(8, 24))


@dataclass(frozen=True)
class Judged(Method):
    """Frees four slots at a time by the attention of the last five queries, and raises what stays by what went."""

    name: ClassVar[str] = "judged"
    accumulates: ClassVar[tuple[str, ...]] = ("bias",)

    def window_of(self, budget: int) -> int:
        """Five queries."""
        return 5

    def leaves(self, budget: int) -> int | None:
        """Four fewer than one too many."""
        return budget - 3

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Keep the newest, and of the rest those the window attends to most; the later a slot, the higher its bias."""
        seen = dataclasses.replace(step, queries=step.window_queries, query_positions=step.window_positions)
        score = sum(p.sum(dim=(2, 3)) for _, p in seen.blocks(slots))
        size = budget - 3 if step.queries.shape[3] == 1 else budget
        left = compact(slots, select(slots, score, size, 0, 1), size)
        order = torch.linspace(-0.5, 1.5, size).expand_as(left.positions) + left.stats["bias"] / 2
        return dataclasses.replace(left, stats={"bias": order.masked_fill(~left.valid, 0)})


@pytest.mark.parametrize("rows", ["even", "padded", "filling"])
def test_biases_and_windows_in_fixed_storage(rows: str, left: list[decode.Decoder]) -> None:
    """A method with a bias a slot and an observation window decodes in storage as `model.generate` does."""
    model = kvrepro.prepare(tiny_model())
    ids, mask = padded(26, 8 if rows == "padded" else 0) if rows != "filling" else padded(10, 3)
    caches = [kvrepro.make_cache(model, "snapkv", 16, window=5) for _ in range(2)]
    for cache in caches:
        cache.method = Judged()
        for layer in cache.compressed:
            layer.method = cache.method
    ours = kvrepro.generate(model, ids, caches[0], 40, attention_mask=mask)
    assert torch.equal(ours, plain(model, caches[1], ids, mask, 40))
    assert_same_cache(*caches)
    assert bool(caches[0].compressed[0].slots.stats["bias"].any())
    assert left[0].modes == ["appended"] * 3
    assert left[0].replayed_due >= (7 if rows != "filling" else 0)


# --- blocks of slots freed in place -----------------------------------------------------------------------------------

#: Options of KVMerger, and the layers of the model.
BLOCKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("kvmerger", {}, 3),
    "one at a time": ("kvmerger", {"block": 1}, 3),
    "attention": ("kvmerger", {"mass": "attention", "reduce": "max"}, 3),
    "cache": ("kvmerger", {"positions": "cache", "shared_sets": True}, 3),
    "cardinality": ("kvmerger", {"positions": "cardinality", "pivot": "random", "reduce": "sum"}, 3),
    "printed": ("kvmerger", {"mass": "none", "sigma": "printed", "sinks": 1}, 3),
    "mean": ("kvmerger", {"weights": "mean", "sigma": 5.0}, 3),
    "skipping": ("kvmerger", {"skip_layers": True}, 5),
    "pairs": ("kvslimmer", {"block": 3}, 3),
    "pairs by gradient": ("asymkv", {"fisher": "forward", "block": 2, "recent": 2}, 3),
    "pooled heads": ("attention_matching", {"window": 6}, 3),
    "pooled heads, sinks": ("attention_matching", {"keys": "mass", "sinks": 1, "block": 3, "positions": "cache"}, 3),
    "pooled heads, one at a time": ("attention_matching", {"block": 1}, 3),
    "equal heads": ("attention_matching", {"heads": "same", "window": 3}, 3),
}


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[decode.Decoder]:
    """Steps are replayed without a GPU, that is, their bodies run again; the decoders that were left since."""
    found: list[decode.Decoder] = []
    leave = decode.Decoder.__exit__
    monkeypatch.setattr(decode.Decoder, "graphed", True)
    monkeypatch.setattr(decode.Decoder, "__exit__", lambda self, *error: (found.append(self), leave(self, *error))[1])
    return found


@pytest.mark.parametrize("rows", ["even", "padded", "filling"])
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_freed_in_place_are_those_of_plain_generate(case: str, rows: str, left: list[decode.Decoder]) -> None:
    """Same tokens, same cache over many blocks; the due steps are replayed, whether padding is gone or never was."""
    name, options, layers = BLOCKS[case]
    model = kvrepro.prepare(tiny_model(layers=layers))
    ids, mask = padded(26, 8 if rows == "padded" else 0) if rows != "filling" else padded(10, 0)
    caches = [kvrepro.make_cache(model, name, 16, **{"block": 4, **options}) for _ in range(2)]
    ours = kvrepro.generate(model, ids, caches[0], 40, attention_mask=mask)
    assert torch.equal(ours, plain(model, caches[1], ids, mask, 40))
    assert_same_cache(*caches)
    first = 6 if rows == "filling" else 0  # steps before one is due
    due = len(range(first, 39, caches[0].method.block))
    # Two steps warm up, one of each kind at least.
    common_first, alone = first > 0, caches[0].method.block == 1
    assert left[0].replayed_due == due - (2 if alone and not common_first else 1)
    assert left[0].replayed == 39 - (3 if common_first else 2)


@pytest.mark.parametrize("rows", ["even", "padded", "filling"])
@pytest.mark.parametrize("options", [{"keys": "greedy"}, {"queries": "gaussian", "count": 8, "positions": "cache"}])
def test_fits_are_made_on_the_host(options: dict[str, Any], rows: str, left: list[decode.Decoder]) -> None:
    """A method that promises nothing of its compressions has the steps between them replayed."""
    model = kvrepro.prepare(tiny_model())
    ids, mask = padded(26, 8 if rows == "padded" else 0) if rows != "filling" else padded(10, 3)
    caches = [kvrepro.make_cache(model, "attention_matching", 16, block=4, **options) for _ in range(2)]
    ours = kvrepro.generate(model, ids, caches[0], 40, attention_mask=mask)
    assert torch.equal(ours, plain(model, caches[1], ids, mask, 40))
    assert_same_cache(*caches)
    assert left[0].modes == ["appended"] * 3 and left[0].replayed > 10 and left[0].replayed_due == 0


@pytest.mark.parametrize("method", ["kvmerger", "attention_matching"])
def test_empty_slots_are_compressed_on_the_host(
    model: PreTrainedModel, method: str, left: list[decode.Decoder]
) -> None:
    """A row that is shorter than the budget waits while the other one's slots are merged."""
    ids, mask = padded(20, 7)
    caches = [kvrepro.make_cache(model, method, 16, block=4) for _ in range(2)]
    ours = kvrepro.generate(model, ids, caches[0], 30, attention_mask=mask)
    assert torch.equal(ours, plain(model, caches[1], ids, mask, 30))
    assert_same_cache(*caches)
    assert left[0].replayed > 10 and left[0].replayed_due == 0


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("case", ["plain", "pairs", "pooled heads", "equal heads"])
def test_padding_in_every_row_is_no_slot(case: str, rows: int, left: list[decode.Decoder]) -> None:
    """As many empty slots in front of each row are empty all the same, when the first block is due."""
    name, options, layers = BLOCKS[case]
    model = kvrepro.prepare(tiny_model(layers=layers))
    ids, mask = tokens(rows, 12, seed=4), torch.ones(rows, 12, dtype=torch.long)
    ids[:, :3], mask[:, :3] = 0, 0
    caches = [kvrepro.make_cache(model, name, 16, **{"block": 4, **options}) for _ in range(2)]
    ours = kvrepro.generate(model, ids, caches[0], 30, attention_mask=mask)
    assert torch.equal(ours, plain(model, caches[1], ids, mask, 30))
    assert_same_cache(*caches)


def test_layers_that_are_due_at_other_times(model: PreTrainedModel, left: list[decode.Decoder]) -> None:
    """Blocks of one and of two slots: every second step all layers are due, and that one is replayed."""
    ids, mask = padded(40, 0)
    caches = [kvrepro.make_cache(model, "kvmerger", 16) for _ in range(2)]
    for cache in caches:
        for layer, budget in zip(cache.compressed, (16, 32, 16), strict=True):
            layer.budget = budget
    ours = kvrepro.generate(model, ids, caches[0], 13, attention_mask=mask)
    assert torch.equal(ours, plain(model, caches[1], ids, mask, 13))
    assert_same_cache(*caches)
    assert left[0].replayed == left[0].replayed_due == 5


class Launches(TorchDispatchMode):
    """Notes what is launched, with shapes and numbers; raises at what no CUDA graph can hold."""

    asks = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "lift_fresh", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        name = str(function)
        masks = "index" in name and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in leaves[1:])
        assert not masks and not any(ask in name.split(".")[1] for ask in self.asks), name
        self.noted.append((name, [tuple(x.shape) if isinstance(x, Tensor) else x for x in leaves]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", BLOCKS)
def test_each_step_of_a_kind_is_the_same_work(case: str) -> None:
    """The host decides nothing in a step, and no number in it changes from one to the next."""
    name, options, layers = BLOCKS[case]
    model = kvrepro.prepare(tiny_model(layers=layers))
    cache = kvrepro.make_cache(model, name, 16, **{"block": 4, **options})
    token = kvrepro.prefill(model, tokens(2, 30), cache).logits[:, -1].argmax(-1)
    work: dict[str, list[Any]] = {"common": [], "due": []}
    with decode.Decoder(model, cache, room=24) as decoder:

        def body() -> None:
            kind = decoder._kind()
            with Launches() as launches:
                token.copy_(decoder.logits(token).argmax(-1))
            work[kind].append(launches.noted)

        decoder.run(body, 24)
    assert len(work["due"]) == 24 // cache.method.block
    for found in work.values():  # the first step may still find every slot to be one token
        assert all(noted == found[-1] for noted in found[1:])


def test_a_promise_that_is_not_kept_is_an_error(model: PreTrainedModel) -> None:
    """And a subclass that compresses otherwise does not inherit it."""
    merger = methods.get("kvmerger")

    class Newest(merger):
        name = "newest"

        def compress(self, slots: Any, budget: int, step: Any) -> Any:
            return slots.map(lambda x: x[:, :, 3:].clone() if x.dim() > 2 else x)

    class Wrong(Newest):
        name = "wrong"
        compress, due, reduce_group = Newest.compress, merger.due, merger.reduce_group

        def leaves(self, budget: int) -> int:
            return budget

    for method, promised in ((Newest(), None), (Wrong(), 16)):
        cache = kvrepro.make_cache(model, "kvmerger", 16)
        token = kvrepro.prefill(model, tokens(1, 20), cache).logits[:, -1].argmax(-1)
        for layer in cache.compressed:
            layer.method = method
        with decode.Decoder(model, cache, room=1) as decoder:
            assert decoder._held[0]._leaves == promised
            if promised is None:
                decoder.run(lambda decoder=decoder, token=token: decoder.logits(token), 1)
                continue
            with pytest.raises(RuntimeError, match="wrong left 14 slots where 16 were promised"):
                decoder.run(lambda decoder=decoder, token=token: decoder.logits(token), 1)


# --- perplexity ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_one_by_one(model: PreTrainedModel, ids: Tensor, name: str, budget: Any, options: dict[str, Any]) -> Tensor:
    """`[B, W - 1]`: negative log-likelihoods with one forward a token."""
    cache = kvrepro.make_cache(model, name, budget, **options)
    cache.plan(ids.shape[1])
    found = []
    for t in range(ids.shape[1] - 1):
        logits = kvrepro.prefill(model, ids[:, t : t + 1], cache, chunk=1).logits[:, -1]
        found.append(torch.nn.functional.cross_entropy(logits, ids[:, t + 1], reduction="none"))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_perplexity_is_exact_to_the_token(model: PreTrainedModel, case: str) -> None:
    name, options, budget, _ = CASES[case]
    options = {key: value for key, value in options.items() if key != "window"}  # perplexity's own argument
    ids = tokens(2, 40, seed=8)
    out = kvrepro.perplexity(model, ids, name, budget, window=36, stride=30, **options)
    wanted = read_one_by_one(model, ids[:, :36], name, budget, options)[:, -30:]
    torch.testing.assert_close(out.nll[:, 0].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_in_every_family(family: str) -> None:
    model = kvrepro.prepare(tiny_model(family))
    ids = tokens(2, 36, seed=9)
    for name in ("weightedkv", "kvmerger"):
        out = kvrepro.perplexity(model, ids, name, 16, window=36, stride=35)
        wanted = read_one_by_one(model, ids, name, 16, {})
        torch.testing.assert_close(out.nll[:, 0].double(), wanted, rtol=1e-5, atol=1e-5)


def test_perplexity_holds_few_logits(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before anything is compressed is cut so that its logits fit; the values stay."""
    ids = tokens(2, 40, seed=8)
    whole = kvrepro.perplexity(model, ids, "h2o", 30, window=40, stride=38)
    seen = []
    monkeypatch.setattr("kvrepro.evaluate._LOGITS", 2 * 7 * VOCABULARY)
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    cut = kvrepro.perplexity(model, ids, "h2o", 30, window=40, stride=38)
    model.lm_head._forward_hooks.clear()
    assert max(seen) == 7
    torch.testing.assert_close(whole.nll, cut.nll)


# --- out of memory ---------------------------------------------------------------------------------------------------


def failing_after(model: PreTrainedModel, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model runs out of memory after some forward passes."""
    left, forward = [passes], model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", run)


@pytest.mark.parametrize(
    ("name", "budget", "chunk", "free", "advice"),
    [
        ("h2o", 16, None, 200_000, r"chunk=\d+"),
        ("h2o", 4000, 8, 200_000, r"budget=\d+ and chunk=8 would fit"),
        ("full", None, 8, 200_000, r"would fit with a method that compresses"),
        ("h2o", 16, 8, 10, "no budget fits"),
    ],
)
def test_out_of_memory_says_what_would_fit(
    name: str, budget: int | None, chunk: int | None, free: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kvrepro.prepare(tiny_model())
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    failing_after(model, 2 if chunk else 0, monkeypatch)
    cache = kvrepro.make_cache(model, name, budget)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 7 GiB") as caught:
        kvrepro.prefill(model, tokens(1, 4096), cache, chunk=chunk)
    said = str(caught.value)
    how = "in chunks of 8" if chunk else "all at once"
    assert f"reading 1 x 4096 tokens {how} with method {name!r}" in said
    assert "unlimited" in said if budget is None else f"budget={budget}" in said
    assert f"the cache held {memory._size(cache.nbytes)}" in said
    assert re.search(advice, said), said


def test_the_suggested_chunk_fits_the_estimate() -> None:
    """The estimate, turned around: budget and chunk take no more than the free memory."""
    model = kvrepro.prepare(tiny_model())
    cache = kvrepro.make_cache(model, "h2o", 16)
    said = memory._advice(model, cache, 2, 4096, None, 1 << 22)
    chunk = int(said.split("chunk=")[1].split(")")[0])
    slot, work = memory.slot_bytes(model, cache), memory._pass_bytes(model)
    assert chunk >= 1 and 2 * ((16 + chunk) * slot + chunk * work) <= 1 << 22
    assert 2 * ((16 + 4 * chunk) * slot + 4 * chunk * work) > 0.9 * (1 << 22)


def test_slot_bytes_are_what_a_cache_holds(model: PreTrainedModel) -> None:
    for name in ("streaming_llm", "weightedkv", "full"):
        cache = kvrepro.make_cache(model, name, 16)
        kvrepro.prefill(model, tokens(3, 20), cache)
        slots = cache.compressed[0].slots.size
        assert cache.nbytes == 3 * slots * memory.slot_bytes(model, cache)


def test_generate_out_of_memory_while_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same message, and the cache is given back."""
    model = kvrepro.prepare(tiny_model())
    failing_after(model, 3, monkeypatch)
    cache = kvrepro.make_cache(model, "h2o", 16)
    with pytest.raises(torch.OutOfMemoryError, match=r"reading 1 x 34 tokens .* 'h2o' and budget=16"):
        kvrepro.generate(model, tokens(1, 24), cache, 10)
    assert cache.compressed[0].static is None and cache.compressed[0].slots.size == 16


def test_rows_that_fit_take_a_quarter_of_the_memory(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.free_bytes(torch.device("cpu")) > 1 << 20
    cache = kvrepro.make_cache(model, "h2o", 16)
    row = 16 * memory.slot_bytes(model, cache)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 5 * row)
    assert memory.rows_that_fit(model, cache, 100, 128) == 5
    assert memory.rows_that_fit(model, cache, 100, 3) == 3
    assert memory.rows_that_fit(model, kvrepro.make_cache(model, "full"), 1000, 128) == 1
