"""Bad input: one clear error that says what is valid, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_model, tokens
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

import kvrepro
from kvrepro import methods
from kvrepro.adapter import cache_arguments, is_prepared

NAMES = methods.names()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """One small model for all tests here."""
    return kvrepro.prepare(tiny_model())


@pytest.fixture
def idle(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A model that must not be run."""

    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("computed before checking")

    monkeypatch.setattr(model, "forward", run)
    return model


def test_unknown_method_lists_the_valid_ones(idle: PreTrainedModel) -> None:
    """From every door."""
    for call in (
        lambda: kvrepro.make_cache(idle, "h20", 16),
        lambda: methods.create("h20"),
        lambda: methods.describe("h20"),
        lambda: kvrepro.perplexity(idle, tokens(40), "h20", 16, window=20, stride=10),
        lambda: kvrepro.fidelity(idle, tokens(1, 40), "h20", 16, context=20, continuation=10),
    ):
        with pytest.raises(ValueError, match="h20") as error:
            call()
        assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option_lists_the_valid_ones(idle: PreTrainedModel, name: str) -> None:
    """Every method knows its own options."""
    with pytest.raises(ValueError, match="sigmas") as error:
        kvrepro.make_cache(idle, name, 32, sigmas=5.0)
    assert all(option.name in str(error.value) for option in methods.describe(name).options)


@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_not_a_choice_lists_the_choices(idle: PreTrainedModel, name: str) -> None:
    """Every option that has choices refuses others, of the right type and of the wrong one."""
    for option in methods.describe(name).options:
        for bad in ("nonsense", 1.5, 1, None) if option.choices else ():
            if bad in option.choices and type(bad) in map(type, option.choices):
                continue
            with pytest.raises(ValueError, match=option.name) as error:
                kvrepro.make_cache(idle, name, 32, **{option.name: bad})
            assert all(repr(choice) in str(error.value) for choice in option.choices)


@pytest.mark.parametrize(
    "name, options",
    [
        ("h2o", {"sinks": -1}),
        ("h2o", {"sinks": 2.5}),
        ("h2o", {"sinks": "4"}),
        ("h2o", {"sinks": True}),
        ("h2o", {"recent": -2}),
        ("weightedkv", {"recent": 0.5}),
        ("random", {"seed": 1.5}),
        ("random", {"seed": None}),
        ("snapkv", {"window": 0}),
        ("snapkv", {"window": 4.5}),
        ("snapkv", {"kernel": 4}),
        ("pyramidkv", {"beta": 0}),
        ("cam", {"targets": 0}),
        ("cam", {"targets": 2.5}),
        ("d2o", {"alpha": 1.5}),
        ("d2o", {"alpha": "half"}),
        ("keepkv", {"threshold": 3}),
        ("kvmerger", {"epsilon": 2.0}),
        ("kvmerger", {"sigma": "wide"}),
        ("kvmerger", {"sigma": -1.0}),
        ("kvmerger", {"sigma": 0}),
        ("kvmerger", {"sigma": float("nan")}),
        ("kvmerger", {"recent": 1.5}),
        ("kvmerger", {"recent": -1}),
        ("kvmerger", {"topk": -3}),
        ("kvmerger", {"topk": -0.1}),
        ("kvmerger", {"block": 0}),
        ("kvmerger", {"block": 1000}),
        ("attention_matching", {"count": 0}),
        ("attention_matching", {"fitted": 0}),
        ("attention_matching", {"ahead": 2.5}),
        ("attention_matching", {"ridge": 0}),
        ("attention_matching", {"newest": 1.5}),
        ("attention_matching", {"window": -1}),
        ("attention_matching", {"block": 1000}),
    ],
)
def test_values_out_of_range(idle: PreTrainedModel, name: str, options: dict[str, Any]) -> None:
    """The error names the option."""
    with pytest.raises(ValueError, match=next(iter(options))):
        kvrepro.make_cache(idle, name, 32, **options)


@pytest.mark.parametrize("budget", [0, -3, 0.0, -0.5, 1.5, 2.0, float("nan"), True, "16", (16,)])
@pytest.mark.parametrize("name", ["full", "weightedkv"])
def test_budgets_that_are_none(idle: PreTrainedModel, name: str, budget: Any) -> None:
    """Zero, negative, above 1 as a share, or no number at all."""
    with pytest.raises(ValueError, match="budget"):
        kvrepro.make_cache(idle, name, budget)


@pytest.mark.parametrize(
    "name, options, least",
    [
        ("streaming_llm", {"sinks": 4, "recent": 6}, 11),
        ("h2o", {"sinks": 4, "recent": 6}, 11),
        ("tova", {"recent": 8}, 9),
        ("keydiff", {"sinks": 3, "recent": 3}, 7),
        ("random", {"sinks": 3, "recent": 3}, 7),
        ("cam", {"sinks": 4, "recent": 6}, 11),
        ("d2o", {"sinks": 4, "recent": 6}, 11),
        ("keepkv", {"recent": 9}, 10),
        ("weightedkv", {"sinks": 4, "recent": 6}, 11),
        ("asymkv", {"sinks": 4, "recent": 6}, 11),
        ("kvslimmer", {"sinks": 4, "recent": 6}, 11),
        ("kvmerger", {"sinks": 4, "recent": 6, "topk": 0, "block": 1}, 11),
        ("attention_matching", {"sinks": 4, "recent": 6}, 11),
    ],
)
def test_a_budget_below_sinks_and_recent(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], least: int
) -> None:
    """sinks + recent + 1 slots work; one fewer is an error, as a share before the prompt is read."""
    if name == "asymkv":
        options = {**options, "fisher": "forward"}
    cache = kvrepro.make_cache(model, name, least, **options)
    kvrepro.prefill(model, tokens(1, 30), cache, chunk=7)
    assert all(layer.keys.shape[2] <= least for layer in cache.compressed)
    with pytest.raises(ValueError, match=f"{least - 1} slots.*{least}"):
        kvrepro.make_cache(model, name, least - 1, **options)
    share = kvrepro.make_cache(model, name, (least - 1) / 30, **options)
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(ValueError, match=f"{least - 1} slots.*{least}"):
        kvrepro.prefill(model, tokens(1, 30), share)


def test_defaults_leave_room_in_small_budgets(model: PreTrainedModel) -> None:
    """From 16 slots on every method works without options."""
    for name in NAMES:
        for budget in (16, 17, 23, 33):
            cache = kvrepro.make_cache(model, name, budget)
            kvrepro.prefill(model, tokens(1, 40), cache, chunk=20)
            held = sum(float(layer.slots.valid.sum(2).float().mean()) for layer in cache.compressed)
            assert name == "full" or held <= 3 * budget


def test_asymkv_with_sinks_that_leave_no_room_for_a_chunk(model: PreTrainedModel) -> None:
    """It must end: in a compressed cache or in an error that says what to change."""
    cache = kvrepro.make_cache(model, "asymkv", 16, sinks=12, recent=1)
    kvrepro.prefill(model, tokens(1, 30), cache)
    assert all(layer.keys.shape[2] <= 16 for layer in cache.compressed)


@pytest.mark.parametrize("what", ["bloom", "linear"])
def test_a_model_without_the_attention_interface(what: str) -> None:
    """The error says which families work."""
    if what == "bloom":
        broken = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    else:
        broken = nn.Linear(2, 2)
    for call in (lambda: kvrepro.prepare(broken), lambda: kvrepro.make_cache(broken, "h2o", 16)):
        with pytest.raises(ValueError, match="attention interface.*Llama"):
            call()


def test_a_model_that_takes_no_cache() -> None:
    """Else the keyword would be ignored, and every number would be the full cache's."""

    class Forgetful(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(input_ids)

    forgetful = Forgetful(tiny_model().config)
    for call in (lambda: kvrepro.prepare(forgetful), lambda: kvrepro.make_cache(forgetful, "h2o", 16)):
        with pytest.raises(ValueError, match="neither cache nor past_key_values.*AutoModelForCausalLM"):
            call()
    assert not is_prepared(forgetful)


def test_rotary_embeddings_that_cannot_be_undone() -> None:
    """Interleaved pairs: methods that move keys are refused with the way out, the others work."""
    model = tiny_model("cohere", dtype=torch.float32)
    for name, options in (
        ("weightedkv", {}),
        ("kvslimmer", {"positions": "original"}),
        ("h2o", {"positions": "cache"}),
    ):
        with pytest.raises(ValueError, match="positions='original'"):
            kvrepro.make_cache(model, name, 16, **options)
    cache = kvrepro.make_cache(model, "weightedkv", 16, positions="original")
    kvrepro.prefill(model, tokens(1, 30), cache)
    assert all(layer.keys.shape[2] == 16 for layer in cache.compressed)


def test_models_without_rotary_embeddings_or_without_full_layers() -> None:
    """GPT-2 keeps original positions only; a Mistral of sliding windows has nothing to compress."""
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()
    with pytest.raises(ValueError, match="no rotary.*positions='original'"):
        kvrepro.make_cache(gpt2, "weightedkv", 16)
    cache = kvrepro.make_cache(gpt2, "h2o", 16)
    kvrepro.prefill(gpt2, tokens(1, 30), cache, chunk=9)
    assert all(layer.keys.shape[2] == 16 for layer in cache.compressed)
    with pytest.raises(ValueError, match="sliding"):
        kvrepro.make_cache(tiny_model("mistral", sliding_window=8), "h2o", 16)


@pytest.mark.parametrize(
    "other", [{"layers": 2}, {"layers": 4}, {"heads": 8, "kv_heads": 2}, {"kv_heads": 4}, {"family": "qwen2"}]
)
def test_a_cache_made_for_another_model(model: PreTrainedModel, other: dict[str, Any]) -> None:
    """More or fewer layers, other heads, another family."""
    stranger = kvrepro.prepare(tiny_model(**other))
    cache = kvrepro.make_cache(model, "h2o", 16)
    with pytest.raises(ValueError, match="another model.*make_cache"), torch.no_grad():
        stranger(tokens(1, 20), **cache_arguments(stranger, cache))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_in_a_model_that_is_not_prepared_any_more(layers: int) -> None:
    """No silent nonsense: the second layer, or the second pass, says what to call."""
    model = tiny_model(layers=layers)
    cache = kvrepro.make_cache(model, "h2o", 16)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"kvrepro\.prepare"), torch.no_grad():
        for _ in range(2):
            model(tokens(1, 20), **cache_arguments(model, cache))


def test_make_cache_prepares_the_model() -> None:
    """The three lines of the README need no `prepare`."""
    model = tiny_model()
    cache = kvrepro.make_cache(model, "weightedkv", 16)
    with torch.no_grad():
        model(tokens(1, 20), **cache_arguments(model, cache))
    assert cache.get_seq_length() == 20


def test_what_a_compressed_cache_refuses(model: PreTrainedModel) -> None:
    """Cropping, custom masks, training with dropout."""
    cache = kvrepro.make_cache(model, "h2o", 16)
    ids = tokens(1, 20)
    kvrepro.prefill(model, ids, cache)
    with pytest.raises(NotImplementedError, match="crop"):
        cache.crop(10)
    fresh = kvrepro.make_cache(model, "h2o", 16)
    mask = torch.ones(1, 1, 20, 25, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask"), torch.no_grad():
        model(ids, attention_mask=mask, **cache_arguments(model, fresh))
    training = tiny_model()
    training.config.attention_dropout = 0.1
    for layer in training.model.layers:
        layer.self_attn.attention_dropout = 0.1
    training.train()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        training(ids, **cache_arguments(training, kvrepro.make_cache(training, "h2o", 16)))


def test_prefill_without_anything_to_read(idle: PreTrainedModel) -> None:
    """An empty prompt, or chunks of nothing."""
    cache = kvrepro.make_cache(idle, "h2o", 16)
    for ids, chunk in ((tokens(1, 0), None), (tokens(1, 5), 0), (tokens(1, 5), -1)):
        with pytest.raises(ValueError, match="chunk"):
            kvrepro.prefill(idle, ids, cache, chunk=chunk)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"window": 50}, "40 tokens.*50"),
        ({"stride": 20}, "stride"),
        ({"stride": 0}, "stride"),
        ({"chunk": 0}, "chunk"),
        ({"batch_size": 0}, "batch_size"),
        ({"budget": 4}, "budget"),
        ({"sinks": 40}, "sinks"),
    ],
)
def test_perplexity_of_what_cannot_be_read(idle: PreTrainedModel, changes: dict[str, Any], says: str) -> None:
    """A text shorter than the window, a stride outside it, no room in the budget: before the model runs."""
    settings = {"window": 20, "stride": 10, "budget": 16, **changes}
    with pytest.raises(ValueError, match=says):
        kvrepro.perplexity(idle, tokens(40), "weightedkv", **settings)


@pytest.mark.parametrize("changes", [{"context": 40}, {"continuation": 0}, {"context": 1}, {"budget": 4}])
def test_fidelity_of_what_cannot_be_read(idle: PreTrainedModel, changes: dict[str, Any]) -> None:
    """A text shorter than context + continuation, nothing to predict, no room in the budget: before the model runs."""
    settings = {"context": 20, "continuation": 10, "budget": 16, **changes}
    with pytest.raises(ValueError):
        kvrepro.fidelity(idle, tokens(1, 40), "weightedkv", **settings)
