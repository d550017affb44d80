"""The papers' models in the hub's cache and their datasets in a data folder: what is there, and getting the rest.

A lock file in the data folder holds, for everything that was fetched, the commit and each file's size and sha256. It
is written before files are put in place, so that whatever an interruption leaves behind is known as ours.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants

from kvrepro.assets import cache_folder, file_sha256
from kvrepro.papers import hub
from kvrepro.papers.convert import CONVERTERS
from kvrepro.papers.hub import PapersError, Repository, Stopped, explained
from kvrepro.papers.table import MODEL_FILES, MODEL_SECOND_COPIES, Dataset, File, Model, entries, size
from kvrepro.tasks.base import MANIFEST
from kvrepro.texts import DATA_VARIABLE

LOCK = "papers.lock.json"
_TEMPORARY = ".papers-"
_BEGIN = "<!-- kvrepro fetch papers: what stands from here on is written by it -->\n"
_END = "<!-- kvrepro fetch papers: end -->\n"
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class State:
    """What is there of one entry.

    Attributes:
        entry: the model or dataset.
        state: ``here``; ``missing``; ``partly`` downloaded; ``damaged``; ``outdated``, made by another version of the
            table; or ``foreign``: files that this command did not write would be mixed with it.
        detail: what is meant, where the state alone does not say it.
        missing: bytes to download, about.
    """

    entry: Model | Dataset
    state: Literal["here", "missing", "partly", "damaged", "outdated", "foreign"]
    detail: str = ""
    missing: int = 0


def data_folder(to: Path | None = None) -> Path:
    """Where datasets go: the folder given, else ``KVREPRO_DATA_DIR``, else ``papers`` in kvrepro's cache."""
    named = to or os.environ.get(DATA_VARIABLE)
    return Path(named).expanduser().absolute() if named else cache_folder() / "papers"


class Folder:
    """A data folder and what its lock file says.

    Args:
        path: the folder; it need not be there yet.

    Raises:
        PapersError: the lock file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.locked = self._read()

    def _read(self) -> dict[str, Any]:
        file = self.path / LOCK
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))["entries"]) if file.is_file() else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PapersError(
                f"{file} cannot be used ({error}): put it back, or give another folder with --to"
            ) from error

    def lock(self, entry: Model | Dataset, commit: str, files: Mapping[str, Any]) -> None:
        """Write down what an entry is made of, in the lock file and in the manifest that the tasks check against."""
        self.locked[entry.name] = {**recipe(entry), "commit": commit, "files": dict(files)}
        _write_whole(self.path / LOCK, json.dumps({"entries": dict(sorted(self.locked.items()))}, indent=1) + "\n")
        _write_manifest(self)

    def commit(self, entry: Model | Dataset) -> str:
        """The commit to take: the one fetched before, as long as the table still asks for the same revision."""
        before = self.locked.get(entry.name, {})
        return str(before["commit"]) if before.get("asked") == entry.revision else entry.revision

    def repository(self, entry: Model | Dataset) -> Repository:
        """The repository of an entry at the commit to take."""
        return Repository(entry.repo, "model" if isinstance(entry, Model) else "dataset", self.commit(entry))

    @contextmanager
    def held(self) -> Iterator[None]:
        """One process at a time fills the folder; leftovers of one that was killed go."""
        with explained(str(self.path)):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".papers.lock").open("ab")
        with file:
            hub.held(file.fileno(), str(self.path))
            for leftover in self.path.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self.locked = self._read()
            yield


def recipe(entry: Model | Dataset) -> dict[str, Any]:
    """What decides an entry's content, beside the commit."""
    if isinstance(entry, Model):
        return {"asked": entry.revision}
    sources = [file.path or file.url for file in entry.files]
    return {"asked": entry.revision, "convert": entry.convert, "options": dict(entry.options), "sources": sources}


# --- what is there


def look(folder: Folder, chosen: Sequence[Model | Dataset], full: bool = False) -> list[State]:
    """What is there of each entry; asks no network.

    Args:
        folder: the data folder.
        chosen: the entries.
        full: compare sha256 sums, too: a second for the datasets, a minute or more for the models.
    """
    return [_look_model(folder, e, full) if isinstance(e, Model) else _look_dataset(folder, e) for e in chosen]


def _look_model(folder: Folder, model: Model, full: bool) -> State:
    repository = folder.repository(model)
    files = folder.locked.get(model.name, {}).get("files", {})
    cached = {name: repository.cached(name) for name in files}
    faults = [f"{name} is damaged" for name, path in cached.items() if path and not _sound(path, files[name], full)]
    if files and all(cached.values()) and not faults:
        return State(model, "here")
    arrived = min(hub.arrived(repository), model.download)
    state: Literal["damaged", "partly", "missing"] = "damaged" if faults else "partly" if arrived else "missing"
    return State(model, state, ", ".join(faults), model.download - arrived)


def _sound(path: Path, expected: int, full: bool) -> bool:
    """Whether a file of the hub's cache is whole; large ones are named after their sha256."""
    blob = path.resolve()
    named = re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return path.stat().st_size == expected and (not full or not named or file_sha256(blob) == blob.name)


def _look_dataset(folder: Folder, dataset: Dataset) -> State:
    locked = folder.locked.get(dataset.name, {})
    ours = locked.get("files", {})
    there = {path.relative_to(folder.path).as_posix() for path in folder.path.glob(dataset.fills) if path.is_file()}
    repository = folder.repository(dataset)
    missing = sum(file.bytes for file in dataset.files if file.url or not repository.cached(file.path))
    if others := sorted(name for name in there - set(ours) if not _expected(dataset, folder.path, name)):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return State(dataset, "foreign", f"{others[0]}{more}", missing)
    if not ours:
        return State(dataset, "missing", missing=missing)
    if any(locked.get(key) != value for key, value in recipe(dataset).items()):
        return State(dataset, "outdated", "made by another version of the table", missing)
    if faults := _faults(folder.path, ours):
        return State(dataset, "damaged", f"{faults[0]}{f' and {len(faults) - 1} more' if faults[1:] else ''}", missing)
    return State(dataset, "here")


def _expected(dataset: Dataset, folder: Path, name: str) -> bool:
    """Whether a file that somebody else put there has the very content that it is to have."""
    return name in dataset.gives and file_sha256(folder / name) == dataset.gives[name]


def _faults(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Files that are missing or have another content than the lock file says."""
    return [name for name, about in files.items() if not (folder / name).is_file() or _about(folder / name) != about]


def _about(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


# --- what it takes


@dataclass(frozen=True)
class Space:
    """Room on one disk.

    Attributes:
        where: folders on it that are written to.
        needed: bytes.
        free: bytes.
    """

    where: tuple[Path, ...]
    needed: int
    free: int


def space(folder: Folder, states: Sequence[State]) -> list[Space]:
    """What fetching takes on each disk: downloads in the hub's cache, converted files in the data folder."""
    away = [state for state in states if state.state != "here"]
    downloads = Path(constants.HF_HUB_CACHE), sum(state.missing for state in away)
    converted = folder.path, sum(state.entry.disk for state in away if isinstance(state.entry, Dataset))
    disks: dict[int, Space] = {}
    for path, needed in (downloads, converted):
        device, free = hub.free(path)
        before = disks.get(device, Space((), 0, free))
        disks[device] = Space((*before.where, path), before.needed + needed, free)
    return list(disks.values())


def check_space(spaces: Sequence[Space]) -> None:
    """Make sure of enough room before anything starts.

    Raises:
        Stopped: there is too little; says where, and what to do.
    """
    for disk in spaces:
        if disk.needed > disk.free:
            where = " and ".join(str(path) for path in disk.where)
            raise Stopped(
                f"{disk.needed / 1e9:.1f} GB are needed in {where}, where {disk.free / 1e9:.1f} GB are free: free some "
                "space, set HF_HOME (models) or --to (data) to a folder on another disk, or name fewer models. Nothing "
                "was begun"
            )


# --- getting it


def fetch(folder: Folder, states: Sequence[State], *, update: bool = False, say: Callable[[str], None]) -> list[str]:
    """Get everything that is not there.

    Args:
        folder: the data folder.
        states: of the entries wanted, from `look`.
        update: take the newest commit of each, instead of the table's or the one fetched before.
        say: is told what is done.

    Returns:
        What could not be had, each with the reason and what to do; the rest is there.

    Raises:
        Stopped: no network, no space, or another process at work; what has arrived is kept.
        PapersError: files that are not ours are in the way.
    """
    foreign = [f"{s.entry.name} ({s.detail} in {folder.path})" for s in states if s.state == "foreign"]
    if foreign:
        raise PapersError(
            f"files that this command did not write would be mixed with {'; '.join(foreign)}. Move them away, or give "
            "another folder with --to"
        )
    away = [state for state in states if state.state != "here"]
    if update:
        away = [replace(state, state="outdated", missing=state.entry.download) for state in states]
    check_space(space(folder, away))
    problems: list[str] = []
    with folder.held():
        for state in _accessible(folder, away, problems):
            say(f"{state.entry.name}: {size(state.missing, exact=False)} from {state.entry.repo or 'GitHub'}")
            try:
                _fetch(folder, state, update, say)
            except Stopped:
                raise
            except PapersError as error:
                problems.append(str(error))
    return problems


def _accessible(folder: Folder, states: Sequence[State], problems: list[str]) -> list[State]:
    """Those that this machine may download: gated ones are asked for before the first long download."""
    open_to_us = []
    for state in states:
        try:
            if isinstance(state.entry, Model) and state.entry.gated:
                hub.may_read(folder.repository(state.entry), state.entry.page)
            open_to_us.append(state)
        except Stopped:
            raise
        except PapersError as error:
            problems.append(str(error))
    return open_to_us


def _fetch(folder: Folder, state: State, update: bool, say: Callable[[str], None]) -> None:
    entry = state.entry
    page = entry.page if isinstance(entry, Model) else ""
    with explained(entry.repo or entry.name, page):
        repository = folder.repository(entry)
        if entry.repo and (update or not hub.COMMIT.fullmatch(repository.commit)):
            newest = hub.resolve(Repository(entry.repo, repository.kind, "main"))
            repository = Repository(entry.repo, repository.kind, newest)
        if isinstance(entry, Model):
            _fetch_model(folder, entry, repository, say)
        else:
            _fetch_dataset(folder, entry, repository)


def _fetch_model(folder: Folder, model: Model, repository: Repository, say: Callable[[str], None]) -> None:
    folder.lock(model, repository.commit, {})  # the same commit again, should this be interrupted
    files = hub.sizes(repository, MODEL_FILES, MODEL_SECOND_COPIES)
    if not any(name.endswith(_WEIGHTS) for name in files):
        raise PapersError(
            f"{model.repo} has no {_WEIGHTS} files at {repository.commit[:7]}, which are what is read here"
        )
    for name in sorted(files, key=files.__getitem__):
        cached = repository.cached(name)
        if cached and not _sound(cached, files[name], full=True):
            hub.forget(cached)
        hub.download(repository, name)
    folder.lock(model, repository.commit, files)
    hub.keep_as_main(repository)
    newest = hub.resolve(Repository(model.repo, repository.kind, "main"))
    if newest != repository.commit:
        say(
            f"{model.name}: {repository.commit[:7]} was fetched, but main is now at {newest[:7]} at the hub. Build "
            f"with HF_HUB_OFFLINE=1 to stay with it, or take the new one: kvrepro fetch papers {model.name} --update"
        )


def _fetch_dataset(folder: Folder, dataset: Dataset, repository: Repository) -> None:
    """Download, convert beside the files' places, and rename each file into its place."""
    pinned = repository.commit == dataset.revision
    before = folder.locked.get(dataset.name, {}).get("files", {})
    if not before:
        folder.lock(dataset, repository.commit, {})  # the same commit again, should this be interrupted
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder.path) as temporary:
        downloads, content = Path(temporary) / "downloads", Path(temporary) / "content"
        downloads.mkdir()
        content.mkdir()
        sources = {file.name: _source(file, repository, downloads, pinned) for file in dataset.files}
        CONVERTERS[dataset.convert](sources, content, dataset.options)
        made = sorted(path for path in content.rglob("*") if path.is_file())
        files = {path.relative_to(content).as_posix(): _about(path) for path in made}
        wrong = [name for name, sha256 in dataset.gives.items() if files.get(name, {}).get("sha256") != sha256]
        if pinned and wrong:
            raise PapersError(f"{dataset.name}: {', '.join(wrong)} came out with another content than expected")
        folder.lock(dataset, repository.commit, {**before, **files})
        for name in files:
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            (content / name).replace(folder.path / name)
    for name in set(before) - set(files):
        (folder.path / name).unlink(missing_ok=True)
    folder.lock(dataset, repository.commit, files)


def _source(file: File, repository: Repository, downloads: Path, pinned: bool) -> Path:
    """A downloaded file with the content that the table asks for; a damaged one in the hub's cache is fetched anew."""
    expected = file.sha256 if pinned or file.url else ""
    if file.url:
        path = downloads / file.name
        hub.download_url(file.url, path, file.bytes)
    else:
        path = hub.download(repository, file.path)
        if expected and file_sha256(path) != expected:
            hub.forget(path)
            path = hub.download(repository, file.path)
    if expected and file_sha256(path) != expected:
        raise PapersError(
            f"{file.path or file.url} has another content than the table asks for (sha256 {expected[:12]}…), so it is "
            "not used: it has changed there, or something on the way changes it"
        )
    return path


def _write_manifest(folder: Folder) -> None:
    """The part of the folder's manifest that is ours; what stands before and behind it stays."""
    path = folder.path / MANIFEST
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    others = re.sub(f"{re.escape(_BEGIN)}.*{re.escape(_END)}", "", text, flags=re.DOTALL).rstrip("\n")
    parts = [part for entry in entries() if isinstance(entry, Dataset) and (part := _manifest_part(entry, folder))]
    if parts:
        own = _BEGIN + "\n".join(parts) + _END
        _write_whole(path, f"{others}\n\n{own}" if others else own)


def _manifest_part(dataset: Dataset, folder: Folder) -> str:
    locked = folder.locked.get(dataset.name)
    if not locked or not locked["files"]:
        return ""
    source = f"{dataset.repo}@{locked['commit']}" if dataset.repo else ", ".join(file.url for file in dataset.files)
    rows = "".join(f"| {name} | {f['bytes']} | {f['sha256']} |\n" for name, f in sorted(locked["files"].items()))
    return (
        f"## {dataset.name}\n\n{dataset.title}. Read as: {dataset.read_as}. Source: {source}. Licence: "
        f"{dataset.licence}. {dataset.note}\n\n| file | bytes | sha256 |\n|---|---|---|\n{rows}"
    )


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
