"""The parameters of a notebook: what its parameters cell defines, and what a user may set them to.

Papermill only warns of a parameter that a notebook does not have; here it is an error before anything runs.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kvrepro.book.project import BookError, RequestError

_ASSIGNMENT = re.compile(r"(?:^|\s)([A-Za-z_]\w*)=")
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def defaults(source: Path) -> dict[str, Any]:
    """Names and values that a notebook's parameters cell defines, in order.

    Args:
        source: the notebook.

    Raises:
        BookError: the notebook cannot be read, has not exactly one cell tagged ``parameters``, or this cell holds more
            than assignments of literals.
    """
    import nbformat  # of the extra [book]; what reads words of a command line does without

    try:
        notebook = nbformat.read(source, as_version=4)
    except (OSError, ValueError) as error:
        raise BookError(f"{source} is not a notebook that can be read: {error}") from error
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise BookError(f"{source} must have exactly one cell tagged 'parameters'; it has {len(cells)}")
    found: dict[str, Any] = {}
    for statement in ast.parse(cells[0].source).body:
        name, value = _assignment(statement)
        if name is None:
            raise BookError(f"{source}: line {statement.lineno} of the parameters cell is not 'name = literal'")
        found[name] = value
    return found


def _assignment(statement: ast.stmt) -> tuple[str | None, Any]:
    """Name and value of ``name = literal``, or (None, None) for anything else."""
    target: ast.expr | None = None
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    if not isinstance(target, ast.Name) or statement.value is None:  # type: ignore[attr-defined]
        return None, None
    try:
        return target.id, ast.literal_eval(statement.value)  # type: ignore[attr-defined]
    except ValueError:
        return None, None


def parse(words: Iterable[str]) -> dict[str, Any]:
    """Parameters from ``name=value`` words: ``budget=128 window=1024,2048 methods=[full, kvmerger(sigma=5.0)]``.

    A value is a Python literal, or else a text; commas outside brackets make a list.

    Args:
        words: as the shell splits them; several assignments may stand in one word.

    Raises:
        RequestError: a word that is no assignment, a name given twice, or a name without a value.
    """
    found: dict[str, Any] = {}
    for name, raw in _assignments(" ".join(words)):
        if name in found:
            raise RequestError(f"the parameter {name} is given twice")
        if not raw:
            raise RequestError(f"the parameter {name} has no value: write {name}=value without spaces around the sign")
        found[name] = _value(raw)
    return found


def _assignments(text: str) -> list[tuple[str, str]]:
    """Names and texts of values: an assignment begins at a name and an equals sign outside brackets and quotes."""
    flat = _outside(text)
    starts = list(_ASSIGNMENT.finditer(flat))
    if text.strip() and (not starts or text[: starts[0].start()].strip()):
        raise RequestError(f"parameters are given as name=value, as in budget=128 window=1024,2048; not {text!r}")
    ends = [*(match.start() for match in starts[1:]), len(text)]
    return [(match[1], text[match.end() : end].strip()) for match, end in zip(starts, ends, strict=False)]


def _outside(text: str) -> str:
    """The text with everything inside brackets and quotes, which must be balanced, replaced by underscores."""
    out, closing = [], []
    pairs = {"(": ")", "[": "]", "{": "}"}
    for char in text:
        if closing and char == closing[-1]:
            closing.pop()
        elif char in "\"'" or (char in pairs and not (closing and closing[-1] in "\"'")):
            closing.append(pairs.get(char, char))
        elif not closing:
            out.append(char)
            continue
        out.append("_")
    if closing:
        raise RequestError(f"a {closing[-1]} is missing in {text!r}")
    return "".join(out)


def _value(raw: str) -> Any:
    """One literal, a text, or a list of them."""
    try:
        literal = ast.literal_eval(raw)
        return list(literal) if isinstance(literal, tuple) else literal
    except (ValueError, SyntaxError):
        pass
    if raw in _WORDS:
        return _WORDS[raw]
    if raw.startswith("[") and raw.endswith("]"):
        return [_value(item) for item in _items(raw[1:-1])]
    items = _items(raw)
    return [_value(item) for item in items] if len(items) > 1 else raw


def _items(raw: str) -> list[str]:
    """Parts between commas outside brackets, without surrounding spaces; empty ones are left out."""
    flat = _outside(raw)
    cuts = [-1, *(i for i, char in enumerate(flat) if char == ","), len(raw)]
    parts = [raw[first + 1 : last].strip() for first, last in itertools.pairwise(cuts)]
    return [part for part in parts if part]


def check(notebook: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the notebook takes them, checked against its parameters cell.

    A single value for a parameter whose default is a list becomes a list of one.

    Args:
        notebook: its name, for the error.
        known: what the parameters cell defines.
        given: what is to be set.

    Raises:
        RequestError: an unknown name, or a value of another kind than the default; lists what is valid.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        listing = ", ".join(f"{name}={value!r}" for name, value in known.items()) or "none"
        raise RequestError(f"{notebook} has no parameter {', '.join(unknown)}; it has {listing}")
    return {name: _fitted(notebook, name, known[name], value) for name, value in given.items()}


def _fitted(notebook: str, name: str, default: Any, value: Any) -> Any:
    as_list = isinstance(default, list | tuple)
    examples = [item for item in (default if as_list else [default]) if item is not None]
    items = value if isinstance(value, list) else [value]
    for item in items:
        if examples and item is not None and not any(_alike(example, item) for example in examples):
            raise RequestError(f"{notebook}: {name}={item!r} is not valid; the default is {default!r}")
    return items if as_list else value


def _alike(example: Any, item: Any) -> bool:
    """Whether a value is of the kind of an example: any number for a number, else the same type."""
    numbers = (int, float)
    if isinstance(example, numbers) and not isinstance(example, bool):
        return isinstance(item, numbers) and not isinstance(item, bool)
    return isinstance(item, type(example))
