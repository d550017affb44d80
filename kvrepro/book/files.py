"""Writing files whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvrepro.book.project import BookError


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: readers see the old text or the new one.

    Raises:
        BookError: it cannot be written; what was there is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BookError(
            f"cannot write {path}: {error.strerror or error}; free some space and run this again"
        ) from error


def write_if_changed(path: Path, text: str) -> bool:
    """Write a file unless it holds this text already, so that its time tells when it changed.

    Returns:
        Whether it was written.
    """
    try:
        if path.read_text(encoding="utf-8") == text:
            return False
    except OSError:
        pass
    write_text(path, text)
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file: two builds of one checkout would overwrite each other's pages.

    Raises:
        BookError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise BookError(f"another build of this checkout is running (process {handle.read().strip()})") from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
