"""What the experiments share while they measure: the model, the text, the method's name with its options, the cells."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvrepro import methods, models, texts
from kvrepro.records import Cell, Record, Store, Value

Job = tuple[Cell, Callable[[], Value]]
T = TypeVar("T")


def as_list(value: T | Sequence[T]) -> list[T]:
    """One value or a sequence of them, as a list: a notebook's parameter may be either."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return [value]  # type: ignore[list-item]


@dataclass(frozen=True)
class Variant:
    """A method and the options given to it, as written in a notebook's parameter: ``"kvmerger(sigma=5.0)"``.

    Attributes:
        method: Name of the method.
        options: What differs from the method's defaults.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, label: str) -> Variant:
        """Read ``"name"`` or ``"name(option=value, …)"``; the values are Python literals.

        Raises:
            ValueError: The label is not of this form, or names an unknown method, option or value.
        """
        try:
            tree = ast.parse(label, mode="eval").body
            call = tree if isinstance(tree, ast.Call) else ast.Call(func=tree, args=[], keywords=[])
            if call.args or not isinstance(call.func, ast.Name):
                raise ValueError
            options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError):
            raise ValueError(
                f"{label!r} is not a method: write its name, as h2o, or with options, as kvmerger(sigma=5.0)"
            ) from None
        variant = cls(call.func.id, options)
        methods.create(variant.method, **options)  # lists the valid names where one is wrong
        return variant

    @property
    def label(self) -> str:
        """The variant as :meth:`parse` reads it."""
        options = ", ".join(f"{name}={value!r}" for name, value in sorted(self.options.items()))
        return f"{self.method}({options})" if options else self.method


def parse_variants(labels: str | Iterable[str]) -> list[Variant]:
    """The variants of one label or several, in order.

    Raises:
        ValueError: A label is malformed or appears twice.
    """
    variants = [Variant.parse(label) for label in as_list(labels)]
    names = [variant.label for variant in variants]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"given twice: {', '.join(sorted(twice))}")
    return variants


@lru_cache(maxsize=1)
def _loaded(name: str, device: str | None, dtype: str | None) -> PreTrainedModel:
    """The prepared model, loaded once a process (the last one asked for is kept)."""
    return models.load_model(name, device=device, dtype=dtype)[0]


@lru_cache(maxsize=4)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, loaded once a process: texts are cut and checked before any model is loaded."""
    return models.load_tokenizer(name)


@dataclass(frozen=True)
class Bench:
    """One experiment on one model: makes its cells and runs them.

    Attributes:
        paper: Key of the paper, as the folder under ``notebooks/``.
        experiment: Name of the experiment, as the notebook's.
        model: Model to load, see :func:`kvrepro.load_model`.
        device: Device, or None for the model's default.
        dtype: Name of a torch dtype, or None for the model's default.
    """

    paper: str
    experiment: str
    model: str = models.DEFAULT
    device: str | None = None
    dtype: str | None = None

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The prepared model and its tokenizer. Call it while measuring only: a page with stored cells needs none."""
        return _loaded(self.model, self.device, self.dtype), _tokenizer(self.model)

    @property
    def number_format(self) -> str:
        """Name of the dtype in effect, which a value depends on: None means another one on a GPU than on a CPU."""
        found = models.resolve_dtype(self.dtype, models.resolve_device(self.device))
        return str(found).removeprefix("torch.")

    def windows(self, text: str, length: int, n: int) -> Tensor:
        """Windows of a named text, ``[n, length]``, from as many of its documents as possible.

        Raises:
            ValueError: An unknown or too short text.
        """
        return texts.tokens(texts.load(text), _tokenizer(self.model), length, n)

    def cell(
        self,
        metric: str,
        unit: str,
        *,
        data: str,
        method: str | Variant = "full",
        budget: int | float | None = None,
        seed: int = 0,
        **params: object,
    ) -> Cell:
        """A cell of this experiment.

        Args:
            metric: What is measured.
            unit: Its unit.
            data: Name of the text.
            method: Method or variant; its defaults are written into the cell with its options.
            budget: Slots per KV head and layer, or a share of the prompt.
            seed: Seed of every random draw.
            **params: Everything else the value depends on (window, stride, chunk, n, …).
        """
        variant = method if isinstance(method, Variant) else Variant.parse(method)
        resolved = methods.create(variant.method, **{"seed": seed, **variant.options}).resolved()
        return Cell(
            paper=self.paper,
            experiment=self.experiment,
            metric=metric,
            unit=unit,
            method=variant.method,
            options=resolved,
            model=self.model,
            model_sha256=models.identity(self.model),
            data=data,
            data_sha256=texts.load(data).sha256,
            budget=budget,
            seed=seed,
            params={"label": variant.label, "dtype": self.number_format, **params},
        )

    def sweep(self, jobs: Sequence[Job]) -> list[Record]:
        """Measure what is not measured yet, with a progress bar.

        Raises:
            RuntimeError: No cell at all could be measured.
        """
        records = Store.default().sweep(jobs, f"{self.paper}/{self.experiment}")
        if records and not any(record.status == "ok" for record in records):
            raise RuntimeError(
                f"{self.paper}/{self.experiment}: nothing could be measured; first reason: {records[0].reason}"
            )
        return records
