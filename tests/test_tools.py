"""Plain transformers around a compressed cache: pipelines, and a conversation of several turns over one cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextGenerationPipeline, pipeline
from transformers.cache_utils import Cache

import kvrepro

NEW = 5
TURNS = [tokens(1, 17, seed=1), tokens(1, 9, seed=2), tokens(1, 6, seed=3)]


@contextmanager
def reading(model: PreTrainedModel) -> Iterator[list[int]]:
    """The number of tokens of each forward pass."""
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, out: read.append(given[0].shape[1]))
    yield read
    hook.remove()


def converse(model: PreTrainedModel, cache: Cache | None) -> Tensor:
    """Three turns: what was said before, something new, and the model's answer; all tokens at the end."""
    said = torch.zeros(1, 0, dtype=torch.long)
    for turn in TURNS:
        given = torch.cat([said, turn], dim=1)
        said = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            past_key_values=cache,
            max_new_tokens=NEW,
            do_sample=False,
        )
    return said


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method", kvrepro.methods.names())
def test_three_turns_over_one_unlimited_cache_are_those_of_the_full_cache(method: str, family: str) -> None:
    model = kvrepro.prepare(tiny_model(family))
    cache = kvrepro.make_cache(model, method)
    with reading(model) as read:
        said = converse(model, cache)
    assert torch.equal(said, converse(model, DynamicCache(config=model.config)))
    assert torch.equal(said, converse(model, None))
    steps = [1] * (NEW - 1)
    assert read == [17, *steps, 1 + 9, *steps, 1 + 6, *steps]  # the last word of an answer is read with what follows
    positions = torch.arange(cache.get_seq_length(), dtype=torch.int32)
    assert torch.equal(cache.compressed[0].positions, positions.expand(1, 2, -1))


@pytest.mark.parametrize("method", ["weightedkv", "kvmerger", "kvslimmer", "h2o", "snapkv"])
def test_three_turns_stay_within_the_budget(method: str) -> None:
    model = kvrepro.prepare(tiny_model())
    options = {"window": 2} if method == "snapkv" else {"sinks": 1, "recent": 2}
    cache = kvrepro.make_cache(model, method, budget=12, **options)
    most = []
    hook = model.register_forward_hook(lambda *_: most.append(max(layer.keys.shape[2] for layer in cache.layers)))
    with reading(model) as read:
        converse(model, cache)
    hook.remove()
    assert max(most) == 12
    assert sum(read) == cache.get_seq_length() == 17 + 9 + 6 + 3 * NEW - 1
    assert int(cache.layers[0].positions.max()) == cache.get_seq_length() - 1


@pytest.fixture(scope="module")
def pipe(embedded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> TextGenerationPipeline:
    model, tokenizer = embedded
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def chat(pipe: TextGenerationPipeline, cache: Cache | None) -> list[dict[str, str]]:
    """Three questions, each after all that was said."""
    said: list[dict[str, str]] = []
    for question in ("Name a colour.", "Name another one.", "Which of the two is darker?"):
        said.append({"role": "user", "content": question})
        said = pipe(said, past_key_values=cache, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    return said


def test_a_pipeline_s_chat_over_one_unlimited_cache(pipe: TextGenerationPipeline) -> None:
    with reading(pipe.model) as read:
        cache = kvrepro.make_cache(pipe.model, "weightedkv")
        said = chat(pipe, cache)
    assert said == chat(pipe, None)
    assert sum(read) == cache.get_seq_length()


def test_a_pipeline_s_chat_within_a_budget(pipe: TextGenerationPipeline) -> None:
    with reading(pipe.model) as read:
        cache = kvrepro.make_cache(pipe.model, "h2o", budget=48)
        said = chat(pipe, cache)
    assert [message["role"] for message in said] == ["user", "assistant"] * 3
    assert cache.layers[0].keys.shape[2] == 48 < sum(read) == cache.get_seq_length()
