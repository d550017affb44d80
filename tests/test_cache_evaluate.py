"""Perplexity and fidelity against what they mean, computed the long way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import tiny_model, tokens
from torch import Tensor
from transformers import PreTrainedModel

import kvrepro
from kvrepro.adapter import cache_arguments
from kvrepro.evaluate import continued, full_reference

WINDOW, STRIDE = 24, 10


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """One small model for all tests here."""
    return kvrepro.prepare(tiny_model(layers=2))


@torch.no_grad()
def token_by_token(model: PreTrainedModel, window: Tensor, name: str, budget: int | None, **options: Any) -> Tensor:
    """Negative log-likelihoods of tokens 1 … W-1 of one window, one forward a token."""
    cache = kvrepro.make_cache(model, name, budget, **options)
    found = []
    for t in range(len(window) - 1):
        logits = model(window[None, t : t + 1], **cache_arguments(model, cache)).logits[0, -1]
        found.append(-torch.log_softmax(logits.double(), -1)[window[t + 1]])
    return torch.stack(found)


@pytest.mark.parametrize("name, budget", [("full", None), ("weightedkv", 12), ("streaming_llm", 12), ("tova", 12)])
def test_perplexity_is_sliding_windows_with_fresh_caches(model: PreTrainedModel, name: str, budget: int | None) -> None:
    """Windows start a stride apart, each from an empty cache, the last `stride` tokens of each are scored."""
    text = tokens(50)
    out = kvrepro.perplexity(model, text, name, budget, window=WINDOW, stride=STRIDE, batch_size=2)
    starts = [0, 10, 20]
    expected = torch.stack([token_by_token(model, text[s : s + WINDOW], name, budget)[-STRIDE:] for s in starts])
    torch.testing.assert_close(out.nll.double().view(3, STRIDE), expected, atol=1e-5, rtol=1e-5)
    assert out.ppl == pytest.approx(math.exp(float(expected.mean())), rel=1e-5)
    assert out.positions.view(3, STRIDE).tolist() == [[s + WINDOW - STRIDE + i for i in range(STRIDE)] for s in starts]


def test_perplexity_scores_a_token_with_all_before_it_in_its_window(model: PreTrainedModel) -> None:
    """With the full cache: the plain model's own likelihoods, in any chunks and batches."""
    text = tokens(44, seed=1)
    with torch.no_grad():
        logits = [model(text[None, s : s + WINDOW]).logits[0].double() for s in (0, 10, 20)]
    nll = [
        -torch.log_softmax(x[:-1], -1).gather(1, text[s + 1 : s + WINDOW, None])[:, 0]
        for x, s in zip(logits, (0, 10, 20), strict=True)
    ]
    expected = torch.stack([x[-STRIDE:] for x in nll])
    for chunk, batch_size in ((1, 1), (7, 2), (WINDOW, 8)):
        out = kvrepro.perplexity(model, text, "full", window=WINDOW, stride=STRIDE, chunk=chunk, batch_size=batch_size)
        torch.testing.assert_close(out.nll.double().view(3, STRIDE), expected, atol=1e-5, rtol=1e-5)


def test_perplexity_of_several_texts(model: PreTrainedModel) -> None:
    """Rows are separate texts: the numbers of each are those it has alone."""
    texts = tokens(3, 36, seed=2)
    out = kvrepro.perplexity(model, texts, "h2o", 12, window=WINDOW, stride=12, batch_size=4)
    for b in range(3):
        alone = kvrepro.perplexity(model, texts[b], "h2o", 12, window=WINDOW, stride=12)
        torch.testing.assert_close(out.nll[b], alone.nll.view(out.nll[b].shape))
    assert torch.equal(out.positions.flatten(), torch.arange(12, 36))


def test_perplexity_takes_a_share_of_the_window(model: PreTrainedModel) -> None:
    """budget=0.5 of a window of 24 is 12 slots, though the window is read in small pieces."""
    text = tokens(24, seed=3)
    share = kvrepro.perplexity(model, text, "h2o", 0.5, window=WINDOW, stride=STRIDE)
    slots = kvrepro.perplexity(model, text, "h2o", 12, window=WINDOW, stride=STRIDE)
    assert torch.equal(share.nll, slots.nll)


def test_perplexity_reports_progress(model: PreTrainedModel) -> None:
    """The counts add up to all tokens that are read."""
    read: list[int] = []
    kvrepro.perplexity(model, tokens(44), "h2o", 12, window=WINDOW, stride=STRIDE, chunk=5, progress=read.append)
    assert sum(read) == 3 * (WINDOW - 1) and len(read) > 3


@pytest.mark.parametrize("name", ["weightedkv", "kvmerger", "asymkv", "snapkv"])
@pytest.mark.parametrize("chunk", [None, 6])
def test_fidelity_without_a_budget_is_perfect(model: PreTrainedModel, name: str, chunk: int | None) -> None:
    """No divergence, and the plain model's likelihoods."""
    ids = tokens(2, 40, seed=4)
    out = kvrepro.fidelity(model, ids, name, context=28, continuation=10, chunk=chunk)
    with torch.no_grad():
        logits = model(ids[:, :37]).logits[:, 27:].double()
    expected = -torch.log_softmax(logits, -1).gather(2, ids[:, 28:38, None])[..., 0]
    torch.testing.assert_close(out.nll_full.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.nll, out.nll_full, atol=1e-5, rtol=1e-5)
    assert float(out.kl.abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["weightedkv", "kvmerger", "d2o", "snapkv", "kvslimmer"])
@pytest.mark.parametrize("chunk", [None, 9])
def test_fidelity_compresses_once_and_appends(model: PreTrainedModel, name: str, chunk: int | None) -> None:
    """KL(full ‖ compressed) of a continuation that is read over the compressed context and only appended."""
    ids = tokens(2, 40, seed=5)
    out = kvrepro.fidelity(model, ids, name, 16, context=30, continuation=8, chunk=chunk)
    cache = kvrepro.make_cache(model, name, 16)
    first = kvrepro.prefill(model, ids[:, :30], cache, chunk=chunk).logits
    assert out.nbytes == cache.nbytes
    cache.freeze()
    with torch.no_grad():
        rest = model(ids[:, 30:37], **cache_arguments(model, cache)).logits
        full = torch.log_softmax(model(ids[:, :37]).logits[:, 29:].double(), -1)
    found = torch.log_softmax(torch.cat([first, rest], 1).double(), -1)
    assert all(layer.keys.shape[2] == 16 + 7 for layer in cache.compressed)
    torch.testing.assert_close(out.kl.double(), (full.exp() * (full - found)).sum(-1), atol=1e-5, rtol=1e-4)
    nll = -found.gather(2, ids[:, 30:38, None])[..., 0]
    torch.testing.assert_close(out.nll.double(), nll, atol=1e-5, rtol=1e-5)
    # A whole prompt is predicted with the full cache up to its last token: compression comes after it.
    assert (float(out.kl[:, 0].abs().max()) < 1e-6) == (chunk is None)
    assert float(out.kl[:, 1:].min()) > 0 and out.nbytes < out.nbytes_full


@pytest.mark.parametrize("name", ["full", "weightedkv", "kvmerger", "d2o", "pyramidkv", "kvslimmer", "cam"])
def test_one_reference_serves_many_methods(model: PreTrainedModel, name: str) -> None:
    """Reading the full cache once and replaying it gives what reading it anew gives."""
    ids = tokens(2, 40, seed=6)
    settings = {"context": 30, "continuation": 8}
    reference = full_reference(model, ids, **settings)
    for budget in (16, 0.8):
        once = kvrepro.fidelity(model, ids, name, budget, reference=reference, **settings)
        anew = kvrepro.fidelity(model, ids, name, budget, **settings)
        chunked = kvrepro.fidelity(model, ids, name, budget, chunk=30, **settings)  # reads it itself
        for other in (anew, chunked):
            torch.testing.assert_close(once.kl, other.kl, atol=1e-5, rtol=1e-4)
            assert (once.nbytes, once.nbytes_full) == (other.nbytes, other.nbytes_full)


def test_fidelity_in_a_model_with_sliding_layers() -> None:
    """Gemma's sliding layers cannot be replayed; the answer is the same as reading the context."""
    model = kvrepro.prepare(tiny_model("gemma3", dtype=torch.float32))
    ids = tokens(1, 40, seed=7)
    out = kvrepro.fidelity(model, ids, "h2o", 16, context=30, continuation=8)
    again = kvrepro.fidelity(model, ids, "h2o", 16, context=30, continuation=8, chunk=30)
    torch.testing.assert_close(out.kl, again.kl, atol=1e-5, rtol=1e-4)
    assert float(out.kl[:, 1:].max()) > 0


def test_fidelity_of_a_cache_that_has_read_the_context(model: PreTrainedModel) -> None:
    """However the context was read, it is `fidelity`; a cache that has read something else is refused."""
    ids = tokens(2, 40, seed=8)
    sizes = {"context": 30, "continuation": 10}
    reference = full_reference(model, ids, **sizes)
    for chunk in (None, 9):
        cache = kvrepro.make_cache(model, "weightedkv", 16)
        first = kvrepro.prefill(model, ids[:, :30], cache, chunk=chunk).logits
        found = continued(model, ids, cache, reference, first)
        asked = kvrepro.fidelity(model, ids, "weightedkv", 16, chunk=chunk, **sizes)
        for each in ("kl", "nll", "nll_full"):
            torch.testing.assert_close(getattr(found, each), getattr(asked, each), atol=1e-6, rtol=1e-5)
        assert (found.nbytes, found.nbytes_full) == (asked.nbytes, asked.nbytes_full)
    other = kvrepro.make_cache(model, "weightedkv", 16)
    kvrepro.prefill(model, ids[:, :25], other)
    with pytest.raises(ValueError, match="has read 25 of 40 tokens.*the last 10"):
        continued(model, ids, other, reference)


def test_heads_that_fell_back_are_counted(model: PreTrainedModel) -> None:
    """A text's, over heads and layers; nothing where a method does not count them."""
    ids = tokens(2, 40, seed=9)
    reference = full_reference(model, ids, context=30, continuation=10)
    cache = kvrepro.make_cache(model, "attention_matching", 16)
    assert cache.fallbacks is None
    cache.plan(30)
    cache.replay(reference.passes)
    own = kvrepro.fidelity(model, ids, "attention_matching", 16, context=30, continuation=10, reference=reference)
    assert torch.equal(own.fallbacks, sum(layer.slots.state["fallbacks"].sum(1) for layer in cache.compressed).long())
    for number, layer in enumerate(cache.compressed):
        layer.slots.state["fallbacks"] = torch.tensor([[0.0, 1.0], [number, 2.0]])
    assert continued(model, ids, cache, reference).fallbacks.tolist() == [2, 5]  # of two layers
    roomy = kvrepro.fidelity(model, ids, "attention_matching", None, context=30, continuation=10)
    assert roomy.fallbacks.tolist() == [0, 0]
    assert kvrepro.fidelity(model, ids, "d2o", 16, context=30, continuation=10).fallbacks is None
