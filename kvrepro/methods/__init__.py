"""The methods by name."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from kvrepro.methods.asymkv import AsymKV
from kvrepro.methods.attention_matching import AttentionMatching
from kvrepro.methods.base import Description, Method, Option
from kvrepro.methods.cam import CaM
from kvrepro.methods.d2o import D2O
from kvrepro.methods.full import Full
from kvrepro.methods.h2o import H2O
from kvrepro.methods.keepkv import KeepKV
from kvrepro.methods.keydiff import KeyDiff
from kvrepro.methods.kvmerger import KVMerger
from kvrepro.methods.kvslimmer import KVSlimmer
from kvrepro.methods.pyramidkv import PyramidKV
from kvrepro.methods.random import Random
from kvrepro.methods.snapkv import SnapKV
from kvrepro.methods.streaming_llm import StreamingLLM
from kvrepro.methods.tova import TOVA
from kvrepro.methods.weightedkv import WeightedKV

__all__ = ["Description", "Method", "Option", "create", "describe", "get", "names", "register"]

_METHODS: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Make a method known by its `name`; a decorator for methods written outside this package.

    Raises:
        ValueError: another method has that name.
    """
    if _METHODS.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"there is a method {cls.name!r} already; choose another name than one of {names()}")
    _METHODS[cls.name] = cls
    return cls


def names() -> list[str]:
    """The names of all methods: the full cache, evictions, merges."""
    return list(_METHODS)


def get(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        ValueError: unknown name; lists the valid ones.
    """
    if name not in _METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {names()}")
    return _METHODS[name]


def create(name: str, **options: Any) -> Method:
    """A method with options.

    Args:
        name: one of `names()`.
        **options: the method's options; `describe(name)` lists them.

    Raises:
        ValueError: unknown method, option or value; lists the valid ones.
    """
    cls = get(name)
    valid = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; its options are {valid}")
    return cls(**options)


def describe(name: str) -> Description:
    """What a method is: its paper, its options, their defaults, and where each default comes from.

    Raises:
        ValueError: unknown name; lists the valid ones.
    """
    cls = get(name)
    return Description(
        name=cls.name,
        title=cls.title,
        kind=cls.kind,
        paper=cls.paper,
        url=cls.url,
        summary=inspect.getdoc(cls).split("\n\n")[0].replace("\n", " "),
        options=tuple(
            Option(f.name, f.default, f.metadata["source"], f.metadata["choices"]) for f in dataclasses.fields(cls)
        ),
    )


for _cls in (
    Full,
    StreamingLLM,
    H2O,
    TOVA,
    SnapKV,
    PyramidKV,
    KeyDiff,
    Random,
    CaM,
    D2O,
    KeepKV,
    AsymKV,
    WeightedKV,
    KVMerger,
    KVSlimmer,
    AttentionMatching,
):
    register(_cls)
