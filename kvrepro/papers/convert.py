"""Datasets as downloaded into the files that ``kvrepro.texts`` and ``kvrepro.tasks`` read.

A converter gets the downloads by their names and writes into an empty folder that stands for the data folder.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from kvrepro.papers.hub import PapersError
from kvrepro.tasks import longbench as longbench_suite

Sources = Mapping[str, Path]


def books(sources: Sources, out: Path, options: Mapping[str, Any]) -> None:
    """Rows of parquet files as ``books/pg19_test_000.txt`` and so on, in the order of the rows."""
    texts = [text for path in sources.values() for text in _column(path, "text")]
    for number, text in enumerate(texts):
        _write(out / "books" / f"pg19_test_{number:03d}.txt", text)


def tex(sources: Sources, out: Path, options: Mapping[str, Any]) -> None:
    """Long documents of one part of Proof-pile as ``math/proofpile_test_000.tex`` and so on."""
    for number, text in enumerate(_long_documents(sources, options)):
        _write(out / "math" / f"proofpile_test_{number:03d}.tex", text)


def webtext(sources: Sources, out: Path, options: Mapping[str, Any]) -> None:
    """Long documents as ``webtext/state_union.jsonl``, the one file that the text ``webtext`` is read from."""
    # ASCII, because the reader cuts lines at every separator that Unicode has.
    lines = [json.dumps({"text": text}) + "\n" for text in _long_documents(sources, options)]
    _write(out / "webtext" / "state_union.jsonl", "".join(lines))


def wikitext(sources: Sources, out: Path, options: Mapping[str, Any]) -> None:
    """Lines of WikiText-2 as the raw file had them; the hub's copy has emptied the blank ones."""
    lines = [text or " \n" for path in sources.values() for text in _column(path, "text")]
    _write(out / "wikitext2" / "wiki.test.raw", "".join(lines))


def longbench(sources: Sources, out: Path, options: Mapping[str, Any]) -> None:
    """The English tasks of ``data.zip``, and the two configuration files."""
    archive = sources["data.zip"]
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        _copy(sources[name], out / "longbench" / "config" / name)
    try:
        with zipfile.ZipFile(archive) as members:
            for task in longbench_suite.NAMES:
                with members.open(f"data/{task}.jsonl") as source:
                    target = _place(out / "longbench" / f"{task}.jsonl")
                    with target.open("wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _unexpected(archive, error) from error


def copy(sources: Sources, out: Path, options: Mapping[str, Any]) -> None:
    """The downloads as they are, in one folder, some of them under another name."""
    renamed = options.get("rename", {})
    for name, path in sources.items():
        _copy(path, out / options["folder"] / renamed.get(name, name))


CONVERTERS: Mapping[str, Callable[[Sources, Path, Mapping[str, Any]], None]] = {
    "books": books,
    "tex": tex,
    "webtext": webtext,
    "wikitext": wikitext,
    "longbench": longbench,
    "copy": copy,
}


def _column(path: Path, name: str) -> list[str]:
    """A column of strings of a parquet file."""
    import pandas  # slow to import

    try:
        return [str(value) for value in pandas.read_parquet(path, columns=[name])[name]]
    except ImportError as error:
        raise PapersError("parquet files are read with pyarrow: pip install 'kvrepro[book]'") from error
    except (ValueError, KeyError, OSError) as error:
        raise _unexpected(path, error) from error


def _long_documents(sources: Sources, options: Mapping[str, Any]) -> Iterator[str]:
    """The first documents that are long enough, of the part that is asked for.

    Raises:
        PapersError: none is.
    """
    rows = (row for path in sources.values() for row in _rows(path))
    part = options.get("config")
    wanted = (row["text"] for row in rows if part is None or _part(row) == part)
    long = (text for text in wanted if len(text) >= options["min_characters"])
    documents = list(islice(long, options["documents"]))
    if not documents:
        raise PapersError(f"{', '.join(sources)}: no document is as long as {options['min_characters']} characters")
    yield from documents


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one of them a line, packed by gzip or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                row["text"]  # noqa: B018 (a row without it is no row)
                yield row
    except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise _unexpected(path, error) from error


def _part(row: Mapping[str, Any]) -> str | None:
    """The part of Proof-pile that a row belongs to; its description is an object, or the text of one."""
    meta = row.get("meta")
    about = json.loads(meta) if isinstance(meta, str) else meta
    return about.get("config") if isinstance(about, dict) else None


def _unexpected(path: Path, error: Exception) -> PapersError:
    return PapersError(
        f"{path.name} is damaged or has another form than expected ({type(error).__name__}: {error}). If running the "
        f"same command again does not help, delete {path.resolve()} first"
    )


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(path: Path, text: str) -> None:
    _place(path).write_text(text, encoding="utf-8", newline="")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, _place(target))
