"""KVMerger's experiments: what they compute, on inputs whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kvrepro
from kvrepro.experiments import kvmerger, needle
from kvrepro.experiments.capture import capture_qkv, recording
from kvrepro.methods.kvmerger import KVMerger
from tests.tiny import VOCABULARY, tiny_model


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_capture_sees_what_attention_gets_and_changes_nothing(family: str) -> None:
    model, ids = tiny_model(family), tokens(12)
    before = model(ids).logits
    captured = capture_qkv(model, ids)
    assert torch.equal(model(ids).logits, before)
    assert list(captured) == [0, 1, 2]
    for layer in captured.values():
        group = layer.queries.shape[1] // layer.keys.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (layer.keys, layer.values))
        logits = (layer.queries @ k.mT * layer.scale).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
        # The last query sees everything but for a sliding window; the second sees two tokens in any case.
        assert torch.allclose(logits.softmax(-1)[:, :, 1] @ v, layer.outputs[:, :, 1:2], atol=1e-6) or torch.allclose(
            (logits.softmax(-1) @ v)[:, :, 1], layer.outputs[:, :, 1], atol=1e-6
        )


def test_capture_refuses_unknown_layers_and_gradients_of_several() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="layers 0 … 2"):
        capture_qkv(model, tokens(4), [5])
    with pytest.raises(ValueError, match="one layer"), recording(model, [0, 1], grad=True):
        pass


def test_cosine_by_distance_matches_a_loop() -> None:
    keys = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = kvmerger.cosine_by_distance(keys, [1, 4])
    for place, n in enumerate((1, 4)):
        slow = torch.stack([cosine_similarity(keys[:, i], keys[:, i + n], dim=-1) for i in range(9 - n)]).mean(0)
        assert torch.allclose(found[:, place], slow)


def test_set_sizes() -> None:
    link = torch.tensor([[True, True, False, False, True], [False] * 5, [True] * 5])
    assert kvmerger.set_sizes(link).tolist() == [[3, 1, 2, 0, 0, 0], [1] * 6, [6, 0, 0, 0, 0, 0]]


def test_sets_are_those_that_the_cache_merges() -> None:
    model, ids = tiny_model(), tokens(40)
    options = {"budget_mode": "threshold", "epsilon": 0.2}
    cache = kvrepro.make_cache(model, "kvmerger", 0.5, **options)
    kvrepro.prefill(model, ids, cache)
    method = KVMerger(**options)
    for layer, seen in zip(cache.layers, capture_qkv(model, ids).values(), strict=True):
        sizes = kvmerger.set_sizes(method.links(kvmerger.observe(seen), 20, 0))[0]
        for mine, theirs in zip(sizes, layer.cardinality[0], strict=True):
            assert mine[mine > 0].tolist() == theirs[theirs > 0].tolist()


def test_merging_sets_wants_a_fixed_threshold() -> None:
    with pytest.raises(ValueError, match="fixed threshold"):
        kvmerger.merging_sets("essays", "kvmerger", 64, 1, 0.5, model="smollm2-135m")


def test_similarity_refuses_tokens_outside_the_window() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        kvmerger.similarity("essays", 64, 1, 0, 32, [60], 16, model="smollm2-135m")


def test_haystack_has_the_length_the_needle_and_whole_sentences(
    embedded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    _, tokenizer = embedded
    body = needle._tokens(tokenizer, "It was a fine day. " * 100)[:300]
    for depth in (0.0, 0.5, 1.0):
        stack = needle.make_haystack(tokenizer, body, depth, seed=3)
        text = tokenizer.decode(stack.context[0])
        number = tokenizer.decode(stack.answer[0]).strip()
        assert stack.context.shape[1] + stack.question.shape[1] == 300
        assert f"is {number}." in text
        before = text.split(" The special magic number")[0]
        assert depth == 0.0 or before.rstrip().endswith(".")
        assert tokenizer.decode(stack.question[0]).endswith(" is")
    again = needle.make_haystack(tokenizer, body, 1.0, seed=3)
    assert torch.equal(again.context, stack.context) and torch.equal(again.answer, stack.answer)
    with pytest.raises(ValueError, match="too short"):
        needle.make_haystack(tokenizer, body[:40], 0.5, seed=0)


def test_needle_refuses_bad_depths_and_questions() -> None:
    good = {"text": "essays", "methods": "full", "lengths": 256, "budget": 0.5, "samples": 1, "model": "smollm2-135m"}
    with pytest.raises(ValueError, match="seen"):
        needle.needle(depths=0.5, question="maybe", **good)
    with pytest.raises(ValueError, match="depth"):
        needle.needle(depths=50, question="seen", **good)


def test_full_cache_finds_the_needle(embedded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    names = {"text": "essays", "lengths": 256, "depths": 0.5, "budget": 0.5, "samples": 1, "model": "smollm2-135m"}
    for question in ("seen", "unseen"):
        (record,) = needle.needle(methods="full", question=question, **names)
        assert record.status == "ok" and record.value.extra["found"] == [1]
        assert -0.5 < record.value.value < 0
