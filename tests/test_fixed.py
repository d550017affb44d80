"""Chunks read through fixed storage, as a CUDA graph holds them: the same cache as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model, tokens

import kvrepro
from kvrepro import evaluate, fixed
from kvrepro.cache import CompressedCache
from kvrepro.fixed import RepeatedChunk, repeats

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "streaming_llm": ("streaming_llm", {}),
    "h2o": ("h2o", {}),
    "tova": ("tova", {}),
    "snapkv": ("snapkv", {"window": 4}),
    "pyramidkv": ("pyramidkv", {"window": 4}),
    "keydiff": ("keydiff", {}),
    "random": ("random", {}),
    "cam": ("cam", {}),
    "d2o": ("d2o", {}),
    "keepkv": ("keepkv", {"threshold": 0.3}),
    "weightedkv": ("weightedkv", {}),
    "kvmerger": ("kvmerger", {}),
    "kvslimmer": ("kvslimmer", {}),
    "kvslimmer released": ("kvslimmer", {"variant": "released"}),
    "asymkv": ("asymkv", {"fisher": "forward"}),
    "asymkv loss": ("asymkv", {}),
}


def on_any_device(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let chunks repeat without a GPU: their body is run again instead of replayed. Returns a list that counts them."""
    counted: list[int] = []
    read = RepeatedChunk.__call__

    def counting(self: RepeatedChunk, part: torch.Tensor) -> torch.Tensor:
        """Read, and count."""
        counted.append(part.shape[1])
        return read(self, part)

    monkeypatch.setattr(evaluate, "repeats", lambda model, cache, chunk: fixed.full_and_steady(cache, chunk))
    monkeypatch.setattr(RepeatedChunk, "__call__", counting)
    return counted


def same(a: CompressedCache, b: CompressedCache) -> None:
    """Both caches hold the same and have seen the same."""
    assert a.get_seq_length() == b.get_seq_length() and a.nbytes == b.nbytes
    for one, other in zip(a.compressed, b.compressed, strict=True):
        assert torch.equal(one.positions, other.positions) and torch.equal(one.cardinality, other.cardinality)
        assert torch.equal(one.row_tokens, other.row_tokens)
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)
        torch.testing.assert_close(dict(one.slots.stats), dict(other.slots.stats))
        torch.testing.assert_close(dict(one.slots.state), dict(other.slots.state), equal_nan=True)


@pytest.mark.filterwarnings("ignore:asymkv")  # a last piece of one token has no loss of its own
@pytest.mark.parametrize("name", CASES)
def test_repeated_chunks_read_as_others_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose last piece is shorter, then a second text over the same cache."""
    method, options = CASES[name]
    model, ids = tiny_model(), tokens(2, 163)
    plain, repeated = (kvrepro.make_cache(model, method, 32, **options) for _ in range(2))
    want = [kvrepro.prefill(model, part, plain, chunk=6).logits for part in (ids[:, :120], ids[:, 120:])]
    counted = on_any_device(monkeypatch)
    got = [kvrepro.prefill(model, part, repeated, chunk=6).logits for part in (ids[:, :120], ids[:, 120:])]
    assert counted and set(counted) == {6}
    torch.testing.assert_close(got, want)
    same(plain, repeated)


@pytest.mark.parametrize(
    ("method", "budget", "options"),
    [
        ("full", None, {}),
        ("h2o", 200, {}),
        ("kvmerger", 32, {"budget_mode": "threshold"}),
        ("attention_matching", 32, {}),
    ],
    ids=["full", "not full yet", "unbounded", "without the promise"],
)
def test_what_changes_its_size_is_not_repeated(
    method: str, budget: int | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(), tokens(1, 90)
    counted = on_any_device(monkeypatch)
    kvrepro.prefill(model, ids, kvrepro.make_cache(model, method, budget, **options), chunk=6)
    assert not counted


def test_padding_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that hold different numbers of tokens need a mask, which a replay would not make anew."""
    model, ids = tiny_model(), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    counted = on_any_device(monkeypatch)
    cache = kvrepro.make_cache(model, "h2o", 32)
    kvrepro.prefill(model, ids, cache, attention_mask=mask, chunk=6)
    assert not counted and not repeats(model, cache, 6)
