"""Slow, plain-Python versions of every method: the specification the fast ones are tested against."""

from __future__ import annotations

from typing import Any

from .base import Oracle
from .evicting import H2O, KeyDiff, Random, SnapKV, StreamingLLM, Tova
from .fitting import AttentionMatching
from .kvmerger import KVMerger
from .merging import D2O, CaM, KeepKV, WeightedKV
from .pairs import AsymKV, KVSlimmer

_CLASSES: dict[str, type[Oracle]] = {
    "full": Oracle,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "tova": Tova,
    "snapkv": SnapKV,
    "pyramidkv": SnapKV,
    "keydiff": KeyDiff,
    "random": Random,
    "cam": CaM,
    "d2o": D2O,
    "keepkv": KeepKV,
    "asymkv": AsymKV,
    "weightedkv": WeightedKV,
    "kvmerger": KVMerger,
    "kvslimmer": KVSlimmer,
    "attention_matching": AttentionMatching,
}


def defaults(name: str, budget: int, mean_budget: int, options: dict[str, Any]) -> dict[str, Any]:
    """What each method does where `options` is silent: as the papers, their codes or this project set it.

    Args:
        name: the method.
        budget: slots of the layer.
        mean_budget: slots of the layers on average (PyramidKV's layers differ).
        options: what was asked for; the sinks asked for change the defaults of `recent`.
    """
    sinks = options.get("sinks", 4)
    pairs = {"sinks": min(32, budget // 8), "recent": budget // 4, "positions": "cardinality"}
    window = min(options.get("window", 32), mean_budget // 2)
    narrow = max(1, min(window, budget - options.get("sinks", 0) - 1))
    return {
        "streaming_llm": {"sinks": 4, "recent": budget - sinks, "positions": "cache"},
        "h2o": {"recent": budget // 2},
        "tova": {"recent": 1},
        "snapkv": {"window": window, "recent": window},
        "pyramidkv": {"window": narrow, "recent": narrow},
        "cam": {"sinks": 4, "recent": budget - sinks, "positions": "cache"},
        "d2o": {"sinks": 4, "recent": (budget - sinks) // 2},
        "keepkv": {"recent": budget // 2},
        "asymkv": pairs,
        "weightedkv": {"sinks": 4, "recent": budget // 2 - sinks, "positions": "cache"},
        "kvmerger": {"recent": int(0.34 * budget), "topk": int(0.24 * budget), "block": max(1, budget // 16)},
        "kvslimmer": pairs,
        "attention_matching": {"window": min(32, budget // 16), "block": max(1, budget // 16)},
    }.get(name, {})


def make_oracle(
    name: str, budget: int | None, mean_budget: int | None, options: dict[str, Any], **layer: Any
) -> Oracle:
    """The oracle of one layer; `layer` says its heads, its rotary frequencies and its index."""
    if name == "full" or budget is None:
        return Oracle(**layer)
    options = {k: v for k, v in options.items() if k not in ("fisher", "skip_layers", "beta")}
    keys = options.get("keys")
    if name == "attention_matching" and keys in _CLASSES:
        own = {k: v for k, v in options.items() if k in ("sinks", "recent", "positions", "seed")}
        blocks = {k: v for k, v in options.items() if k == "block" and keys in ("kvmerger", "kvslimmer")}
        mass = {"mass": "attention"} if keys == "kvmerger" else {}
        base = make_oracle(keys, budget, mean_budget, {**own, **blocks, **mass}, **layer)
        options = {**options, "base": base, "positions": base.positions}
    return _CLASSES[name](budget=budget, **{**defaults(name, budget, mean_budget, options), **options}, **layer)
