"""Texts: always the same documents, honest sums, windows that do not overlap, and clear errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvrepro import texts
from kvrepro.texts import Text

LONG = "word " * 300


class Letters:
    """A tokenizer of one token a character; like Llama's it can start each sequence with a BOS token."""

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 1 if bos else None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> SimpleNamespace:
        start = [1] if add_special_tokens and self.bos_token_id is not None else []
        return SimpleNamespace(input_ids=start + [ord(letter) for letter in text])


def make_text(*documents: str) -> Text:
    return Text("toy", documents, "0", "nowhere", "none")


def read(windows: object) -> list[str]:
    return ["".join(map(chr, row)) for row in windows.tolist()]  # type: ignore[attr-defined]


# --- embedded


@pytest.mark.parametrize("name", texts.EMBEDDED)
def test_embedded_texts_need_no_folder(name: str) -> None:
    text = texts.load(name)
    assert text is texts.load(name)
    assert text.name == name
    assert text.source
    assert text.licence
    assert len(text.documents) > 40
    assert min(map(len, text.documents)) >= texts.MIN_CHARACTERS
    assert text.sha256 == hashlib.sha256("\0".join(text.documents).encode()).hexdigest()
    assert sum(map(len, text.documents)) > 600_000


def test_essays_and_kingjames_are_the_known_ones() -> None:
    essays, bible = texts.load("essays"), texts.load("kingjames")
    assert len(essays.documents) == 47
    assert essays.documents[0].startswith("July 2010What hard liquor")
    assert len(bible.documents) == 66
    assert bible.documents[0].startswith("In the beginning God created the heaven and the earth. And the earth")
    assert len(bible.documents[0].split("\n\n")) == 50  # chapters of Genesis


def test_mathematics_holds_docstrings_and_code_holds_source() -> None:
    assert any(">>> " in document for document in texts.load("mathematics").documents)
    code = texts.load("code")
    assert any("class OrderedDict" in document or "def abstractmethod" in document for document in code.documents)
    assert not any(document.startswith("# system configuration generated") for document in code.documents)


def test_docstrings_come_in_the_order_of_the_source() -> None:
    source = '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\ndef g():\n    """Four."""\n'
    assert texts._docstrings(source) == "One.\n\nTwo.\n\nThree.\n\nFour."
    assert texts._docstrings("x = 1") == ""


# --- local copies


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "books/b.txt": "B" + LONG,
        "books/a.txt": "A" + LONG,
        "books/short.txt": "short",
        "math/a.tex": "\\section{A}" + LONG,
        "wikitext2/wiki.test.raw": f" \n = First = \n \n {LONG}\n = = Part = = \n {LONG}\n = Second = \n {LONG}\n",
        "webtext/state_union.jsonl": "\n".join(json.dumps({"path": p, "text": p + LONG}) for p in "xy") + "\n",
        "synthwiki/m.csv": f'context,question,answer\n"{LONG}, with ""quotes""\nand lines",q,a\n',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setenv("KVREPRO_DATA_DIR", str(tmp_path))
    return tmp_path


def test_local_texts_are_read_in_order(data: Path) -> None:
    assert [document[0] for document in texts.load("books").documents] == ["A", "B"]
    assert [document[0] for document in texts.load("webtext").documents] == ["x", "y"]
    assert len(texts.load("math").documents) == 1
    wiki = texts.load("wikitext2").documents
    assert [document.split("\n")[0] for document in wiki] == [" = First = ", " = Second = "]
    assert texts.load("synthwiki").documents[0].endswith('with "quotes"\nand lines')


def test_another_data_folder_is_another_text(
    data: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = texts.load("books").sha256
    other = tmp_path_factory.mktemp("other")
    (other / "books").mkdir()
    (other / "books" / "c.txt").write_text("C" + LONG)
    monkeypatch.setenv("KVREPRO_DATA_DIR", str(other))
    assert texts.load("books").sha256 != first


@pytest.mark.parametrize("name", [name for name in texts.names() if name not in texts.EMBEDDED])
def test_a_missing_folder_or_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="KVREPRO_DATA_DIR names, which is not set; .*essays"):
        texts.load(name)
    monkeypatch.setenv("KVREPRO_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=rf"needs {name.removesuffix('2')}.* in {tmp_path} \(KVREPRO_DATA_DIR\)"):
        texts.load(name)


def test_an_unknown_text_lists_the_names() -> None:
    with pytest.raises(ValueError, match="essays, kingjames, mathematics, code, books"):
        texts.load("essay")


def test_a_text_without_documents_is_an_error(data: Path) -> None:
    for path in (data / "books").iterdir():
        path.write_text("short")
    texts._load.cache_clear()
    with pytest.raises(ValueError, match="no document of 1000 characters"):
        texts.load("books")


# --- windows


def test_windows_take_every_document_before_a_second_window_of_one() -> None:
    text = make_text("aaabbbccc", "xx", "dddeee")
    assert read(texts.tokens(text, Letters(), 3, 5)) == ["aaa", "ddd", "bbb", "eee", "ccc"]
    assert read(texts.tokens(text, Letters(), 3, 2)) == ["aaa", "ddd"]
    assert read(texts.tokens(text, Letters(), 3, 2, offset=2)) == ["bbb", "eee"]


def test_too_few_windows_in_the_documents_are_cut_from_the_whole() -> None:
    assert read(texts.tokens(make_text("abcd", "efgh"), Letters(), 5, 2)) == ["abcd\n", "\n\nefg"]


def test_windows_start_with_the_bos_token_where_the_tokenizer_adds_one() -> None:
    assert texts.tokens(make_text("abcdef"), Letters(bos=True), 3, 2).tolist() == [[1, 97, 98], [1, 99, 100]]


def test_a_short_text_says_how_many_tokens_it_has() -> None:
    with pytest.raises(ValueError, match="has 11 tokens, which is 1 windows of 8, not the 2 asked for"):
        texts.tokens(make_text("abcd", "efgh"), Letters(), 8, 2)
    with pytest.raises(ValueError, match="has 4 tokens, which is 0 windows"):
        texts.tokens(make_text("abcd"), Letters(), 8, 1)


@pytest.mark.parametrize(("length", "n", "offset"), [(1, 1, 0), (4, 0, 0), (4, 1, -1), (-4, 1, 0)])
def test_impossible_sizes_are_refused(length: int, n: int, offset: int) -> None:
    with pytest.raises(ValueError, match="length must be 2 or more"):
        texts.tokens(make_text("abcdefgh"), Letters(), length, n, offset)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    length=st.integers(2, 12),
    n=st.integers(1, 8),
    offset=st.integers(0, 3),
)
def test_windows_never_overlap(lengths: list[int], length: int, n: int, offset: int) -> None:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    letters = "".join(chr(1000 + i) for i in range(ends[-1]))  # every token occurs once
    text = make_text(*(letters[end - size : end] for end, size in zip(ends, lengths, strict=True)))
    try:
        windows = texts.tokens(text, Letters(), length, n, offset)
    except ValueError:
        assert sum(size // length for size in lengths) < n + offset
        return
    assert windows.shape == (n, length)
    used = [token for token in windows.flatten().tolist() if token >= 1000]
    assert len(used) == len(set(used))
    assert all(window in text.text for window in read(windows))


def test_windows_with_the_real_tokenizer(embedded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    tokenizer = embedded[1]
    essays = texts.load("essays")
    windows = texts.tokens(essays, tokenizer, 64, 3)
    assert windows.shape == (3, 64)
    for window, document in zip(windows, essays.documents, strict=False):
        assert document.startswith(tokenizer.decode(window))
