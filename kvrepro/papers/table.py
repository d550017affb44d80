"""The table of the papers' models and data, ``kvrepro/data/papers.yml``, as objects."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).resolve().parent.parent / "data" / "papers.yml"
#: Files of a hub model that ``load_model`` reads. Some repositories hold the weights a second time in another layout.
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
MODEL_SECOND_COPIES = ("original/*", "consolidated*")
_WEIGHT = 2  # bytes of a weight in bfloat16, on disk and in memory
_TOKENIZER = 20_000_000  # bytes of tokenizer and configuration, at most


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What models and datasets have in common.

    Attributes:
        name: how the command calls it.
        repo: on the Hugging Face hub; empty for one that comes from addresses alone.
        revision: a commit, or ``main`` where none is known.
        checked: whether repository, commit and file names were read in public copies.
        licence: of the content.
        papers: which of the three used it.
        used_by: notebooks whose ``paper`` profile names it.
        note: what to know about it, such as how it differs from the paper's.
    """

    name: str
    repo: str = ""
    revision: str
    checked: bool
    licence: str
    papers: tuple[str, ...]
    used_by: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Model(Entry):
    """A model of the hub.

    Attributes:
        gated: whether the hub gives it only to those whom its owner has let in.
        shape: its name in ``kvrepro.models.SHAPES``.
        parameters: number of weights.
        cache_bytes: bytes of the full cache a token, in bfloat16.
        context: tokens that `memory` counts.
    """

    gated: bool
    shape: str
    parameters: int
    cache_bytes: int
    context: int

    kind = "model"
    exact = False

    @property
    def page(self) -> str:
        """Where its owner is asked for access."""
        return f"https://huggingface.co/{self.repo}"

    @property
    def download(self) -> int:
        """Bytes to download, about."""
        return _WEIGHT * self.parameters + _TOKENIZER

    @property
    def memory(self) -> int:
        """Bytes of GPU memory for the weights and the full cache of one sequence of `context` tokens, in bfloat16."""
        return _WEIGHT * self.parameters + self.context * self.cache_bytes


@dataclass(frozen=True)
class File:
    """A file to download.

    Attributes:
        path: in the repository; empty where there is an address.
        url: address; empty where it is in the repository.
        bytes: its size.
        exact: whether the size is known exactly.
        sha256: which it must have; empty where none is known.
    """

    bytes: int
    path: str = ""
    url: str = ""
    exact: bool = True
    sha256: str = ""

    @property
    def name(self) -> str:
        """Its name without folders."""
        return (self.path or self.url).rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Dataset(Entry):
    """A dataset.

    Attributes:
        title: what it is.
        files: what is downloaded.
        convert: a name in ``kvrepro.papers.convert.CONVERTERS``.
        options: of the conversion.
        fills: pattern of the files in the data folder that its readers take.
        gives: sha256 that converted files must have, by path in the data folder.
        read_as: which text or task reads it.
        disk: bytes of the converted files, about.
        split: which of its splits.
    """

    title: str
    files: tuple[File, ...]
    convert: str
    fills: str
    read_as: str
    disk: int
    split: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    gives: Mapping[str, str] = field(default_factory=dict)

    kind = "data"
    gated = False

    @property
    def download(self) -> int:
        """Bytes to download."""
        return sum(file.bytes for file in self.files)

    @property
    def exact(self) -> bool:
        """Whether that number is known exactly."""
        return all(file.exact for file in self.files)


def size(count: int, exact: bool = True) -> str:
    """A number of bytes for people."""
    if count >= 1e9:
        return f"{'' if exact else 'about '}{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB" if exact else f"about {count / 1e6:.0f} MB"


@functools.cache
def entries() -> tuple[Model | Dataset, ...]:
    """Everything in the table, datasets first: they are small."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    datasets = [_dataset(row) for row in table["datasets"]]
    return (*datasets, *(Model(**_frozen(row)) for row in table["models"]))


def _dataset(row: Mapping[str, Any]) -> Dataset:
    return Dataset(**{**_frozen(row), "files": tuple(File(**file) for file in row["files"])})


def _frozen(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def select(names: Sequence[str] = (), everything: bool = False) -> list[Model | Dataset]:
    """Entries by name.

    Args:
        names: names, or models' hub ids; none for what the ``paper`` profile needs.
        everything: all, also what nothing reads yet.

    Raises:
        ValueError: an unknown name; lists the names.
    """
    if everything:
        return list(entries())
    known = {name: entry for entry in entries() for name in (entry.name, entry.repo) if name}
    if unknown := [name for name in names if name not in known]:
        names_there = ", ".join(entry.name for entry in entries())
        raise ValueError(f"nothing is called {', '.join(unknown)}; there are {names_there}")
    chosen = {known[name].name for name in names}
    return [entry for entry in entries() if (entry.name in chosen if names else entry.used_by)]
