"""Where the book's files are, and the list of notebooks with their parameters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

#: What a profile is for, in order of cost.
PROFILES = {
    "smoke": "every page at its smallest: minutes on two CPU cores, for tests",
    "quick": "every page on the embedded model, about 12 minutes on two CPU cores: the default without a GPU",
    "gpu": "one GPU: every figure on the embedded model, efficiency at the papers' model shapes: the default with one",
    "paper": "the papers' own models and datasets, from the Hugging Face hub: one large GPU, hours to days",
}
_NAME = re.compile(r"[a-z0-9_]+/[a-z0-9_]+")


class BookError(RuntimeError):
    """The book could not be made; the message says what failed and what to do."""


class RequestError(ValueError):
    """Something was asked for that does not exist; the message lists what does."""


@dataclass(frozen=True)
class Notebook:
    """One entry of ``notebooks/index.yml`` and the files that belong to it.

    Attributes:
        name: ``<paper>/<name>``, as ``make notebook NB=…`` takes it.
        title: title of its page.
        profiles: parameters that differ from the parameters cell, by profile.
        source: the notebook as it is written.
        page: the notebook as it was run, a page of the book.
        expected: seconds a run takes on two CPU cores with two at a time, by profile, where that is known: for the
            order and the time left, before a first run here tells better.
        twin: whether ``results/published`` keeps its page; not of one that shows what is published itself.
        alone: what of it nothing may run beside, because times are measured: ``whole``, or only the ``times``, when
            other values take long too; empty for nothing.
    """

    name: str
    title: str
    profiles: Mapping[str, Mapping[str, Any]] = field(repr=False)
    source: Path = field(repr=False)
    page: Path = field(repr=False)
    expected: Mapping[str, float] = field(default_factory=dict, repr=False)
    twin: bool = True
    alone: str = ""

    @property
    def stamp(self) -> Path:
        """What the page depended on when it was run."""
        return self.page.with_suffix(".stamp.json")

    @property
    def records(self) -> Path:
        """The records behind the page."""
        return self.page.with_suffix(".records.jsonl")

    def parameters(self, profile: str) -> dict[str, Any]:
        """Parameters of a profile that differ from the parameters cell."""
        return dict(self.profiles[profile])


@dataclass(frozen=True)
class Project:
    """A checkout: every path is taken from its root, never from the working directory.

    Attributes:
        root: the folder that holds ``notebooks/``, ``book/``, ``_config.yml`` and ``_toc.yml``.
    """

    root: Path

    @classmethod
    def find(cls) -> Project:
        """The checkout: ``KVREPRO_ROOT``, the one this package runs from, or one around the working directory.

        Raises:
            BookError: there is none.
        """
        named = os.environ.get("KVREPRO_ROOT")
        here = Path.cwd()
        candidates = [Path(named)] if named else [Path(__file__).resolve().parents[2], here, *here.parents]
        for folder in candidates:
            if (folder / "notebooks" / "index.yml").is_file():
                return cls(folder.resolve())
        where = f"KVREPRO_ROOT={named}" if named else f"{candidates[0]} nor in {here} and above"
        raise BookError(
            f"no notebooks/index.yml in {where}: the book is made from a checkout of the repository; "
            "clone it and run this inside, or set KVREPRO_ROOT to its folder"
        )

    @property
    def index(self) -> Path:
        """The list of notebooks."""
        return self.root / "notebooks" / "index.yml"

    @property
    def book(self) -> Path:
        """Folder of the chapters."""
        return self.root / "book"

    @property
    def pages(self) -> Path:
        """Folder of the executed notebooks; made by the build."""
        return self.book / "results"

    @property
    def runs(self) -> Path:
        """Folder of notebooks run with parameters of one's own."""
        return self.root / "results" / "runs"

    @property
    def work(self) -> Path:
        """Folder of everything that can be made again."""
        return self.root / "_build"

    @property
    def html(self) -> Path:
        """Folder of the built site."""
        return self.work / "html"

    @property
    def front(self) -> Path:
        """The page to open."""
        return self.html / "index.html"

    def notebooks(self) -> list[Notebook]:
        """The notebooks, in the order they are run.

        Raises:
            BookError: ``index.yml`` or a notebook it lists is missing or malformed.
        """
        try:
            entries = yaml.safe_load(self.index.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise BookError(f"cannot read {self.index}: {error}") from error
        if not isinstance(entries, list) or not entries:
            raise BookError(f"{self.index} must be a list of notebooks")
        found = [self._entry(entry) for entry in entries]
        names = [notebook.name for notebook in found]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise BookError(f"{self.index} lists {', '.join(twice)} twice")
        return found

    def _entry(self, entry: Any) -> Notebook:
        problem = _entry_problem(entry)
        if problem:
            raise BookError(f"{self.index}: {problem}")
        name = entry["name"]
        notebook = Notebook(
            name=name,
            title=str(entry["title"]),
            profiles={profile: dict(entry["profiles"].get(profile) or {}) for profile in PROFILES},
            source=self.root / "notebooks" / f"{name}.ipynb",
            page=self.pages / f"{name}.ipynb",
            expected=dict(entry.get("seconds") or {}),
            twin=bool(entry.get("twin", True)),
            alone=entry.get("alone", ""),
        )
        if not notebook.source.is_file():
            raise BookError(f"{self.index} lists {name}, but there is no {notebook.source}")
        return notebook

    def select(self, names: Sequence[str]) -> list[Notebook]:
        """The notebooks named, in the order of the index; all of them for no names.

        Args:
            names: as in the index; ``.ipynb``, a leading ``notebooks/`` and the paper's part may be left out or added.

        Raises:
            RequestError: an unknown name; lists the valid ones.
        """
        every = self.notebooks()
        valid = [notebook.name for notebook in every]
        wanted = {_resolve(name, valid) for name in names}
        return [notebook for notebook in every if not names or notebook.name in wanted]


def _entry_problem(entry: Any) -> str | None:
    """What is wrong with an entry of the index, or None."""
    if not isinstance(entry, dict) or not {"name", "title", "profiles"} <= set(entry):
        return f"an entry needs name, title and profiles: {entry!r}"
    if not isinstance(entry["name"], str) or not _NAME.fullmatch(entry["name"]):
        return f"{entry['name']!r} is not of the form paper/name in small letters"
    if not isinstance(entry["profiles"], dict):
        return f"{entry['name']}: profiles must map a profile's name to parameters"
    if unknown := sorted(set(entry["profiles"]) - set(PROFILES)):
        return f"{entry['name']}: unknown profile {', '.join(unknown)}; there are {', '.join(PROFILES)}"
    if entry.get("alone", "") not in ("", "whole", "times"):
        return f"{entry['name']}: alone is whole or times, not {entry['alone']!r}"
    return None


def _resolve(name: str, valid: Sequence[str]) -> str:
    short = name.removesuffix(".ipynb").removeprefix("./").removeprefix("notebooks/")
    matches = [v for v in valid if v == short] or [v for v in valid if v.split("/")[1] == short]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise RequestError(f"{name!r} may be {' or '.join(matches)}: give the whole name")
    raise RequestError(f"unknown notebook {name!r}; there are {', '.join(valid)}")


def check_profile(profile: str) -> str:
    """The profile's name, checked.

    Raises:
        RequestError: an unknown profile; lists the valid ones.
    """
    if profile not in PROFILES:
        raise RequestError(f"unknown profile {profile!r}; there are {', '.join(PROFILES)}")
    return profile
