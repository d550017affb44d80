"""Every method inside a real (tiny) model, against its oracle: outputs of each pass and the slots after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import assert_same_slots, oracle_for, recorded, rotary_frequencies
from tiny import FAMILIES, tiny_model, tokens
from transformers import PreTrainedModel

import kvrepro
from kvrepro.adapter import cache_arguments

PROMPT, DECODED, BUDGET = 26, 6, 16

#: Every method with its defaults, then its variants and options.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("streaming_llm", {}),
    ("streaming_llm", {"sinks": 2, "recent": 6, "positions": "original"}),
    ("h2o", {}),
    ("h2o", {"positions": "cache"}),
    ("h2o", {"sinks": 3, "recent": 4}),
    ("h2o", {"recent": 0}),
    ("tova", {}),
    ("tova", {"sinks": 2, "recent": 5, "positions": "cache"}),
    ("snapkv", {}),
    ("snapkv", {"window": 4, "kernel": 3}),
    ("pyramidkv", {}),
    ("keydiff", {}),
    ("keydiff", {"sinks": 2, "recent": 4, "positions": "cache"}),
    ("random", {}),
    ("random", {"seed": 5, "sinks": 1, "recent": 3, "positions": "cache"}),
    ("cam", {}),
    ("cam", {"targets": 3, "sinks": 2, "positions": "original", "seed": 3}),
    ("d2o", {}),
    ("d2o", {"sinks": 0, "recent": 3, "alpha": 0.2}),
    ("keepkv", {}),
    ("keepkv", {"threshold": -1.0, "sinks": 1}),
    ("weightedkv", {}),
    ("weightedkv", {"merge": False}),
    ("weightedkv", {"sinks": 0, "recent": 0, "positions": "original"}),
    ("weightedkv", {"positions": "cardinality"}),
    ("kvmerger", {}),
    ("kvmerger", {"sigma": 5.0, "sinks": 1}),
    ("kvmerger", {"sigma": "printed"}),
    ("kvmerger", {"pivot": "random", "seed": 2}),
    ("kvmerger", {"weights": "mean", "recent": 3, "topk": 2}),
    ("kvmerger", {"reduce": "max"}),
    ("kvmerger", {"reduce": "sum", "positions": "cache"}),
    ("kvmerger", {"shared_sets": True}),
    ("kvmerger", {"budget_mode": "threshold", "epsilon": 0.2}),
    ("kvmerger", {"block": 3}),
    ("kvmerger", {"mass": "attention"}),
    ("kvmerger", {"mass": "none", "positions": "cardinality"}),
    ("asymkv", {"fisher": "forward"}),
    ("asymkv", {"fisher": "forward", "variant": "released", "overlap": "released"}),
    ("asymkv", {"fisher": "forward", "positions": "original", "sinks": 0, "recent": 1}),
    ("asymkv", {"fisher": "forward", "block": 2}),
    ("kvslimmer", {}),
    ("kvslimmer", {"block": 2, "recent": 3}),
    ("kvslimmer", {"overlap": "released"}),
    ("kvslimmer", {"variant": "released"}),
    ("kvslimmer", {"variant": "released", "overlap": "released", "positions": "cache"}),
    ("attention_matching", {}),
    ("attention_matching", {"heads": "same"}),
    ("attention_matching", {"least": 0.5, "block": 2, "window": 3, "sinks": 1, "positions": "cache"}),
    ("attention_matching", {"keys": "mass", "newest": 0.0, "sinks": 2, "recent": 3}),
    ("attention_matching", {"queries": "gaussian", "count": 12, "window": 3, "seed": 4}),
    ("attention_matching", {"block": 4, "positions": "cache", "ridge": 0.1, "window": 5}),
    ("attention_matching", {"count": 7, "ahead": 3, "rounds": 0, "window": 0, "newest": 1.0}),
    ("attention_matching", {"count": 11, "fitted": 4, "window": 6, "block": 3}),
    ("attention_matching", {"count": 2, "fitted": 2, "heads": "same"}),
    ("attention_matching", {"keys": "greedy"}),
    ("attention_matching", {"keys": "greedy", "newest": 0.0, "sinks": 2, "recent": 3, "fitted": 5, "block": 4}),
    ("attention_matching", {"keys": "streaming_llm", "block": 3, "window": 3}),
    ("attention_matching", {"keys": "h2o", "block": 4, "window": 5, "fitted": 3}),
    ("attention_matching", {"keys": "tova", "sinks": 1, "positions": "cache"}),
    ("attention_matching", {"keys": "snapkv", "block": 2, "window": 2}),
    ("attention_matching", {"keys": "keydiff", "recent": 2, "window": 4}),
    ("attention_matching", {"keys": "random", "seed": 3, "block": 2, "window": 4}),
    ("attention_matching", {"keys": "weightedkv", "block": 3, "window": 4}),
    ("attention_matching", {"keys": "kvmerger", "block": 3, "window": 4}),
    ("attention_matching", {"keys": "kvslimmer", "window": 4}),
]


def label(case: tuple[str, dict[str, Any]]) -> str:
    """kvmerger(sigma=5.0)."""
    return f"{case[0]}({', '.join(f'{k}={v}' for k, v in case[1].items())})"


def follow(
    model: PreTrainedModel, name: str, options: dict[str, Any], sizes: list[int], prompt: int, atol: float = 1e-5
) -> None:
    """Read a text in pieces of the given sizes and follow every pass through every layer with an oracle."""
    cache = kvrepro.make_cache(model, name, BUDGET, **options)
    cache.plan(prompt)
    ids = tokens(1, sum(sizes))
    followers = [oracle_for(layer, model, name, options) for layer in cache.compressed]
    for each in followers:
        each.peers = followers
    start = 0
    for n in sizes:
        with recorded(cache) as passes, torch.no_grad():
            model(ids[:, start : start + n], **cache_arguments(model, cache))
        start += n
        for oracle, (seen,) in zip(followers, passes, strict=True):
            expected = oracle.feed(seen.queries[0].numpy(), seen.keys[0].numpy(), seen.values[0].numpy())
            np.testing.assert_allclose(seen.output[0], expected, atol=atol, rtol=atol)
        for layer, oracle in zip(cache.compressed, followers, strict=True):
            assert_same_slots(layer, oracle, atol=atol)


def in_chunks(chunk: int) -> list[int]:
    """The prompt in chunks, then one token at a time."""
    return [min(chunk, PROMPT - start) for start in range(0, PROMPT, chunk)] + [1] * DECODED


@pytest.mark.parametrize("chunk, kv_heads", [(1, 2), (3, 4), (PROMPT, 2)], ids=["token-gqa", "three-mha", "whole-gqa"])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_method_equals_its_oracle(case: tuple[str, dict[str, Any]], chunk: int, kv_heads: int) -> None:
    """Same outputs, same slots, after every pass and in every layer."""
    follow(tiny_model(layers=2, kv_heads=kv_heads), *case, in_chunks(chunk), PROMPT)


@pytest.mark.parametrize("name", ["h2o", "weightedkv", "kvmerger", "kvslimmer", "cam"])
def test_method_equals_its_oracle_with_one_kv_head(name: str) -> None:
    """Multi-query attention: all query heads share one KV head."""
    follow(tiny_model(layers=2, kv_heads=1), name, {}, in_chunks(3), PROMPT)


@pytest.mark.parametrize("name", ["h2o", "d2o", "weightedkv", "kvmerger", "kvslimmer", "asymkv"])
def test_method_equals_its_oracle_in_float32(name: str) -> None:
    """The same choices in the precision models are run in."""
    model = tiny_model(layers=2, dtype=torch.float32)
    follow(model, name, {"fisher": "forward"} if name == "asymkv" else {}, in_chunks(5), PROMPT, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["weightedkv", "kvmerger", "kvslimmer", "streaming_llm"])
def test_method_equals_its_oracle_in_every_family(family: str, name: str) -> None:
    """Normalised keys, biases, caps on logits, two kinds of rotary embedding, sliding layers in between."""
    follow(tiny_model(family), name, {}, [12, 9, 1, 1, 3, 1], 26)


ROPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "linear": {"factor": 4.0},
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", ["weightedkv", "kvslimmer"])
def test_method_equals_its_oracle_with_scaled_rotary_embeddings(name: str, rope: str) -> None:
    """Keys are turned with the model's own frequencies, whatever it did to them."""
    model = tiny_model(layers=2, rope_parameters={"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]})
    assert not np.allclose(rotary_frequencies(model), rotary_frequencies(tiny_model()))
    follow(model, name, {}, [12, 9, 1, 1, 3, 1], 26)


@pytest.mark.parametrize("name", ["weightedkv", "kvslimmer"])
def test_method_equals_its_oracle_with_partly_rotated_keys(name: str) -> None:
    """Half of each key is not rotated and is left alone."""
    model = tiny_model("phi3", layers=2)
    assert len(rotary_frequencies(model)) == 2  # of 8 dimensions, 4 are rotated
    follow(model, name, {}, [12, 9, 1, 1, 3, 1], 26)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(CASES), st.lists(st.integers(1, 12), min_size=2, max_size=7))
def test_method_equals_its_oracle_however_the_text_is_cut(case: tuple[str, dict[str, Any]], sizes: list[int]) -> None:
    """Any sequence of passes, long and short ones mixed."""
    follow(tiny_model(layers=1), *case, [*sizes, 9, 1, 8, 1], sum(sizes))
