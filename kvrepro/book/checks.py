"""Whether a profile can run here: asked before anything is computed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from kvrepro import assets, models, texts
from kvrepro.book.project import BookError
from kvrepro.tasks import longbench, synthwiki, zeroscrolls

_NEEDS_GPU = ("gpu", "paper")
_MODEL_NAMES = ("model", "models")
_TEXT_NAMES = ("text", "texts", "data")
_TASK_NAMES = ("tasks",)


def default_profile() -> str:
    """``gpu`` where torch finds CUDA, else ``quick``."""
    return "gpu" if torch.cuda.is_available() else "quick"


def check_profile_runs(profile: str, parameters: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that everything a profile needs is there; the embedded model and texts are fetched when they are not.

    Args:
        profile: the profile.
        parameters: every parameter of each notebook to be run.

    Raises:
        BookError: something is missing; lists all of it, and what to do.
        kvrepro.assets.AssetError: the embedded model or a text cannot be fetched.
    """
    if missing := profile_problems(profile, parameters):
        listing = "\n".join(f"  - {problem}" for problem in missing)
        fetch = " `kvrepro fetch papers` gets its models and data." if profile == "paper" else ""
        other = f"{fetch} PROFILE=quick runs on any machine." if profile in _NEEDS_GPU else ""
        raise BookError(f"the profile {profile} cannot run here yet:\n{listing}\nNothing was run.{other}")
    if any(asset.state != "ready" for asset in assets.status()):
        assets.fetch()


def profile_problems(profile: str, parameters: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a profile lacks on this machine, one line each; empty when it can run. Asks the hub for models not here.

    Args:
        profile: the profile.
        parameters: every parameter of each notebook of it.
    """
    problems = []
    if profile in _NEEDS_GPU and not torch.cuda.is_available():
        problems.append(f"a GPU: torch {torch.__version__} finds no CUDA here; install a CUDA build of torch on one")
    problems += [problem for name in sorted(_named(parameters, _TEXT_NAMES)) if (problem := _text_problem(name))]
    problems += [problem for name in sorted(_named(parameters, _MODEL_NAMES)) if (problem := _model_problem(name))]
    if profile == "paper":  # the pages of the other profiles do without tasks whose data are not here
        problems += _task_problems(sorted(_named(parameters, _TASK_NAMES)))
    return problems


def _named(parameters: Iterable[Mapping[str, Any]], names: Sequence[str]) -> set[str]:
    """Values of some parameters over all notebooks, lists taken apart."""
    found: set[str] = set()
    for given in parameters:
        for name in names:
            value = given.get(name) or []
            found.update([value] if isinstance(value, str) else value)
    return found


def _text_problem(name: str) -> str | None:
    if name in texts.EMBEDDED:
        return None
    try:
        texts.load(name)
    except ValueError as error:
        return str(error)
    return None


def _task_problems(names: Iterable[str]) -> list[str]:
    """The tasks whose data are missing, in one line with the first reason."""
    missing = {name: reason for name in names if (reason := _task_problem(name))}
    return [f"data of the tasks {', '.join(missing)}: {next(iter(missing.values()))}"] if missing else []


def _task_problem(name: str) -> str | None:
    suite, _, rest = name.rpartition("/")
    try:
        if suite == zeroscrolls.SUITE:
            zeroscrolls.load(rest, 1)
        elif name in longbench.NAMES:
            longbench.load(name, 1)
        elif name in synthwiki.NAMES:
            texts.load("synthwiki")
    except ValueError as error:
        return str(error)
    return None


def _model_problem(name: str) -> str | None:
    """What keeps a model from being loaded, None for nothing. Built-in shapes with random weights need nothing."""
    if name in models.SHAPES or Path(name).expanduser().is_dir():
        return None
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    return _hub_problem(name)


@functools.cache
def _hub_problem(name: str) -> str | None:
    if constants.HF_HUB_OFFLINE:
        return f"the model {name}: not in the hub's cache, and HF_HUB_OFFLINE keeps it from being fetched"
    try:
        HfApi().auth_check(name)
    except GatedRepoError:
        return f"the model {name}: gated; ask for access on its page at the hub, then `hf auth login`"
    except RepositoryNotFoundError:
        return f"the model {name}: the hub has none of this name, or it is private (`hf auth login`)"
    except Exception as error:  # whatever the hub's HTTP library raises: its errors have no base class of ours
        return f"the model {name}: not in the hub's cache, and the hub cannot be reached ({type(error).__name__})"
    return None
