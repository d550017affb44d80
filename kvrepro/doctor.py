"""What this machine has and lacks for kvrepro, and the command that gets what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from kvrepro import assets, provenance
from kvrepro.book.checks import profile_problems
from kvrepro.book.project import PROFILES, BookError, Notebook, Project
from kvrepro.papers.fetch import Folder, data_folder, look
from kvrepro.papers.hub import PapersError
from kvrepro.papers.table import select
from kvrepro.texts import DATA_VARIABLE

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_TOOLS = {"papermill": "papermill", "jupyter_book": "jupyter-book", "ipykernel": "ipykernel", "seaborn": "seaborn"}
_FETCH = "kvrepro fetch papers (with --dry-run: what, how large, and which models are gated)"
_DISK_NEEDED = 2e9  # the embedded model, records and pages


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what.
        state: ``ok``; ``warning``, something optional is missing; ``problem``, the default profile cannot run.
        detail: what was found.
        fix: what to do, empty when nothing.
    """

    name: str
    state: Literal["ok", "warning", "problem"]
    detail: str
    fix: str = ""


def examine(online: bool = False) -> list[Finding]:
    """Look at everything. Without ``online`` no network is asked.

    Args:
        online: also ask the hub whether the ``paper`` profile's models can be had.
    """
    notebooks = _notebooks()
    found = [*_software(), *_book_tools(notebooks), *_machine(), *_assets(), *_browser()]
    return found if _missing_tools() else [*found, *_profiles(notebooks, online)]


def _notebooks() -> list[Notebook] | BookError:
    """The checkout's notebooks, or why there are none."""
    try:
        return Project.find().notebooks()
    except BookError as error:
        return error


def _software() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    fix = "install Python 3.11 or newer, then: PYTHON=python3.12 make book" if old else ""
    yield Finding("python", "problem" if old else "ok", f"{platform.python_version()} in {sys.prefix}", fix)
    yield Finding("torch", "ok", torch.__version__)
    yield Finding("transformers", "ok", metadata.version("transformers"))


def _book_tools(notebooks: list[Notebook] | BookError) -> Iterator[Finding]:
    if missing := _missing_tools():
        listed = ", ".join(missing)
        if isinstance(notebooks, BookError):
            yield Finding("book tools", "warning", f"missing: {listed} (only to make the book, from a checkout)")
        else:
            yield Finding("book tools", "problem", f"missing: {listed}", "pip install -e '.[book]'")
    else:
        yield Finding("book tools", "ok", f"jupyter-book {metadata.version('jupyter-book')}")


def _missing_tools() -> list[str]:
    return [package for module, package in _TOOLS.items() if importlib.util.find_spec(module) is None]


def _machine() -> Iterator[Finding]:
    yield Finding("cpu", "ok", f"{provenance.cpu_name()}, {os.cpu_count()} cores")
    if torch.cuda.is_available():
        about = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        shown = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in about)
        yield Finding("gpu", "ok", shown)
    else:
        yield Finding("gpu", "warning", "none: the profiles gpu and paper cannot run")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    small = memory < 7.5
    yield Finding("memory", "warning" if small else "ok", f"{memory:.0f} GiB", "8 GiB are needed" if small else "")
    free = shutil.disk_usage(_existing(assets.cache_folder())).free
    low = free < _DISK_NEEDED
    fix = "free some space, or set KVREPRO_CACHE to a folder on another disk" if low else ""
    yield Finding("disk", "warning" if low else "ok", f"{free / 1e9:.0f} GB free at {assets.cache_folder()}", fix)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(folder for folder in [path, *path.parents] if folder.exists())


def _assets() -> Iterator[Finding]:
    for asset in assets.status(full=True):
        ready = asset.state == "ready"
        detail = f"{asset.size / 1e6:.1f} MB in {asset.path}" if ready else f"{asset.state}: {asset.detail}"
        yield Finding(asset.title, "ok" if ready else "problem", detail, "" if ready else "kvrepro fetch")


def _browser() -> Iterator[Finding]:
    browser = find_browser()
    driver = shutil.which("chromedriver")
    if browser and driver:
        yield Finding("chromium", "ok", browser)
    else:
        missing = " and ".join(name for name, path in [("chromium", browser), ("chromedriver", driver)] if not path)
        fix = "apt-get install chromium chromium-driver"
        yield Finding("chromium", "warning", f"no {missing}: the tests of the built pages are skipped", fix)


def find_browser() -> str | None:
    """Path of Chromium or a relative of it, None where there is none."""
    return next((path for name in _BROWSERS if (path := shutil.which(name))), None)


def _profiles(notebooks: list[Notebook] | BookError, online: bool) -> Iterator[Finding]:
    from kvrepro.book.parameters import defaults

    if isinstance(notebooks, BookError):
        yield Finding("notebooks", "warning", str(notebooks))
        return
    known = {notebook.name: defaults(notebook.source) for notebook in notebooks}
    for profile in PROFILES:
        if profile == "paper" and not online:
            yield _papers()
            continue
        problems = profile_problems(profile, [{**known[nb.name], **nb.parameters(profile)} for nb in notebooks])
        state: Literal["ok", "warning", "problem"] = "ok"
        if problems:
            state = "problem" if profile in ("smoke", "quick") else "warning"
        detail = f"needs {'; '.join(problems)}" if problems else f"can run: make book PROFILE={profile}"
        yield Finding(f"profile {profile}", state, detail, _FETCH if problems and profile == "paper" else "")


def _papers() -> Finding:
    """What is there of the papers' own models and data; asks no network."""
    try:
        folder = Folder(data_folder())
        states = look(folder, select())
    except PapersError as error:
        return Finding("profile paper", "warning", str(error))
    away = [state for state in states if state.state != "here"]
    if not away:
        fix = "" if os.environ.get(DATA_VARIABLE) else f"export {DATA_VARIABLE}={folder.path}"
        detail = f"all {len(states)} models and datasets are here, data in {folder.path}"
        return Finding("profile paper", "ok", detail, fix)
    there = f"{len(states) - len(away)} of {len(states)} models and datasets are here"
    size = sum(state.missing for state in away) / 1e9
    return Finding("profile paper", "ok", f"{there}; {size:.1f} GB to fetch; --online asks the hub for access", _FETCH)
