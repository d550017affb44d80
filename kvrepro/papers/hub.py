"""Single files of the Hugging Face hub: large ones go on where an earlier download stopped, errors say what to do.

``huggingface_hub`` forgets half a file when its process ends; here the half stays beside its place in the hub's cache.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers, filter_repo_objects

from kvrepro.assets import file_sha256

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Files smaller than this are simply downloaded again.
_LARGE = 5_000_000


class PapersError(RuntimeError):
    """One model or dataset cannot be had; the message says why and what to do."""


class Stopped(PapersError):
    """Nothing more can be had: no network, or no space."""


@dataclass(frozen=True)
class Repository:
    """A repository at a commit.

    Attributes:
        name: on the hub.
        kind: ``model`` or ``dataset``.
        commit: forty hexadecimal digits, or a branch to be resolved.
    """

    name: str
    kind: str
    commit: str

    @property
    def folder(self) -> Path:
        """Where the hub's cache keeps it."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type=self.kind)

    def cached(self, path: str) -> Path | None:
        """A file in the hub's cache, None where it is not there."""
        found = try_to_load_from_cache(self.name, path, revision=self.commit, repo_type=self.kind)
        return Path(found) if isinstance(found, str) else None


_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (
        GatedRepoError,
        "it is gated, and this machine's token does not open it: ask for access at {page}, make a token at "
        "https://huggingface.co/settings/tokens, then: hf auth login",
    ),
    (
        RevisionNotFoundError,
        "the hub no longer has this commit. Name it with --update to take the newest one instead; numbers from it are "
        "of another version",
    ),
    (
        RepositoryNotFoundError,
        "the hub shows no such repository to this machine. It was renamed or removed, or it is closed to you: hf auth "
        "login",
    ),
    (
        RemoteEntryNotFoundError,
        "a file that the table names is not there at this commit. Name it with --update to look at the newest one",
    ),
)


@contextmanager
def explained(what: str, page: str = "") -> Iterator[None]:
    """Turn the errors of a download into one that says what to do; whatever is finished stays.

    Args:
        what: what is downloaded.
        page: where access is asked for.
    """
    try:
        yield
    except (HTTPError, OSError, json.JSONDecodeError) as error:
        raise _reason(what, page, error) from error


def _reason(what: str, page: str, error: Exception) -> PapersError:
    for kind, text in _REASONS:
        if isinstance(error, kind):
            return PapersError(f"{what}: {text.format(page=page)}")
    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500 and error.response.status_code != 429:
        return PapersError(f"{what}: the hub refuses it ({_first_line(error)})")
    if isinstance(error, OSError) and not isinstance(error, HTTPError | ConnectionError | LocalEntryNotFoundError):
        return _disk(what, error)
    return _unreachable(what, error)


def _unreachable(what: str, error: Exception) -> Stopped:
    if constants.HF_HUB_OFFLINE:
        return Stopped(f"{what} is not here, and HF_HUB_OFFLINE keeps it from being fetched: unset it")
    return Stopped(
        f"{what}: the network or the hub cannot be reached ({type(error).__name__}: {_first_line(error)}). What has "
        "arrived is kept; run the same command again when there is a network"
    )


def _disk(what: str, error: OSError) -> PapersError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Stopped(
            f"{what}: the disk is full. What has arrived is kept; free some space, or set HF_HOME (models) or --to "
            "(data) to a folder on another disk, and run the same command again"
        )
    if error.errno is None:  # the library's own: fewer bytes came than were announced
        return Stopped(f"{what}: the download broke off ({_first_line(error)}). Run the same command again")
    return PapersError(f"{what} cannot be stored: {error.strerror} ({error.filename or constants.HF_HUB_CACHE})")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def resolve(repository: Repository) -> str:
    """The commit that a branch is at now; needs the network."""
    sha = HfApi().repo_info(repository.name, repo_type=repository.kind, revision=repository.commit).sha
    assert sha is not None  # the hub gives it with every answer
    return sha


def sizes(repository: Repository, allow: tuple[str, ...], ignore: tuple[str, ...]) -> dict[str, int]:
    """Bytes of a repository's files, by path; needs the network.

    Args:
        repository: at a commit.
        allow: patterns of the files wanted.
        ignore: patterns of those among them that are not.
    """
    info = HfApi().repo_info(
        repository.name, repo_type=repository.kind, revision=repository.commit, files_metadata=True
    )
    found = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return {name: found[name] for name in filter_repo_objects(found, allow_patterns=allow, ignore_patterns=ignore)}


def may_read(repository: Repository, page: str) -> None:
    """Ask the hub whether this machine may download from a repository.

    Raises:
        PapersError: it may not; says what to do.
    """
    with explained(repository.name, page):
        HfApi().auth_check(repository.name, repo_type=repository.kind)


def download(repository: Repository, path: str) -> Path:
    """A file in the hub's cache, downloaded where it is not there; a large one goes on where it stopped.

    Args:
        repository: at a commit.
        path: the file's, in the repository.

    Raises:
        PapersError: it came out with another content than the hub says; it is fetched anew the next time.
    """
    if cached := repository.cached(path):
        return cached
    url = hf_hub_url(repository.name, path, repo_type=repository.kind, revision=repository.commit)
    about = get_hf_file_metadata(url)
    if about.size and about.size >= _LARGE and about.etag and _SHA256.fullmatch(about.etag):
        blob = repository.folder / "blobs" / about.etag
        if not blob.exists():
            _download_large(url, blob, about.size, path)
    return Path(hf_hub_download(repository.name, path, repo_type=repository.kind, revision=repository.commit))


def _download_large(url: str, blob: Path, size: int, path: str) -> None:
    """Fill a blob of the hub's cache, which is named after its sha256, by way of a part that may be there already."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.part")
    with part.open("ab") as file:
        held(file.fileno(), path)
        if file.tell() > size:
            file.truncate(0)
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers={**build_hf_headers(), "Accept-Encoding": "identity"},  # a range of the file itself
            expected_size=size,
            displayed_filename=path,
        )
    if file_sha256(part) != blob.name:
        part.unlink()
        raise PapersError(f"{path} was damaged on the way and has been deleted: run the same command again")
    part.replace(blob)


def held(handle: int, what: str) -> None:
    """Lock an open file.

    Raises:
        Stopped: another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stopped(f"{what} is being fetched by another process: wait for it") from None


def download_url(url: str, target: Path, size: int) -> None:
    """A small file from an address outside the hub."""
    with target.open("wb") as file:
        http_get(url, file, headers={}, expected_size=size, displayed_filename=target.name)


def arrived(repository: Repository) -> int:
    """Bytes of a repository in the hub's cache, of whatever commit, unfinished files included."""
    blobs = repository.folder / "blobs"
    return sum(path.stat().st_size for path in blobs.iterdir()) if blobs.is_dir() else 0


def forget(path: Path) -> None:
    """Delete a damaged file of the hub's cache with what its name points to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def keep_as_main(repository: Repository) -> None:
    """Let the hub's cache take this commit for the branch ``main``, which is what ``load_model`` asks for."""
    reference = repository.folder / "refs" / "main"
    reference.parent.mkdir(parents=True, exist_ok=True)
    temporary = reference.with_name(f".main.{os.getpid()}")
    temporary.write_text(repository.commit, encoding="utf-8")
    temporary.replace(reference)


def free(folder: Path) -> tuple[int, int]:
    """Device and free bytes of the disk that a folder is on, or will be."""
    there = next(path for path in [folder, *folder.parents] if path.exists())
    return there.stat().st_dev, shutil.disk_usage(there).free
