"""What a page depends on, and whether it still holds.

A page depends on its notebook (text of the cells, not outputs), its parameters, the modules of ``kvrepro`` that the
notebook imports, directly or not, the methods whose records it shows, and the package's data files. The other methods
do not count, nor do comments and docstrings: see :mod:`kvrepro.fingerprint`.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from kvrepro.book.files import write_text
from kvrepro.book.project import Notebook
from kvrepro.fingerprint import CORE, HARNESS, PACKAGE, PACKAGE_DIR, CodeIndex, imported_modules

_SCHEMA = 1


@dataclass(frozen=True)
class Stamp:
    """What a page was made from.

    Attributes:
        profile: profile it was run for, empty for a run with parameters of one's own.
        parameters: what differed from the parameters cell.
        source: sha256 of the notebook's cells.
        code: sha256 of every module and data file it depends on, by name.
        methods: methods whose records it shows.
        records: keys of its records.
        statuses: number of records by status.
        seconds: how long it ran.
        environment: commit, dirty, date, device, threads, versions.
        failure: what went wrong, empty when all went well.
    """

    profile: str
    parameters: Mapping[str, Any]
    source: str
    code: Mapping[str, str]
    methods: Sequence[str] = ()
    records: Sequence[str] = ()
    statuses: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    environment: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""

    @classmethod
    def read(cls, path: Path) -> Stamp | None:
        """The stamp in a file; None where there is none, or one of another version of this package."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(**data) if data.pop("schema", None) == _SCHEMA else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write(self, path: Path) -> None:
        """Write the stamp, whole or not at all."""
        write_text(path, json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1, sort_keys=True) + "\n")


def source_hash(source: Path) -> str:
    """The sha256 of a notebook's cells: kind, text and tags, whatever its outputs and metadata."""
    notebook = nbformat.read(source, as_version=4)
    cells = [[cell.cell_type, cell.source, sorted(cell.metadata.get("tags", []))] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def imports(source: Path) -> set[str]:
    """Dotted names that the code cells of a notebook import; lines of IPython's own syntax do not count."""
    notebook = nbformat.read(source, as_version=4)
    found: set[str] = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))]
            try:
                found |= imported_modules(ast.parse("\n".join(lines)), "__main__", is_package=False)
            except SyntaxError:
                continue  # the notebook fails when it is run, and says where
    return found


class Sources:
    """The package's sources as they are at one moment: what a page that is run now depends on.

    Attributes:
        folder: the package's folder.
    """

    def __init__(self, folder: Path = PACKAGE_DIR) -> None:
        """Every method is read at once, so that a later edit cannot slip into the stamp of an earlier run."""
        self.folder = folder
        self._index = CodeIndex(folder=folder, harness=HARNESS - {"plots"})  # a page shows its figures
        self._every_method = sorted(
            path.stem for path in (folder / "methods").glob("*.py") if path.stem not in ("__init__", "base")
        )
        self._data = {
            f"data/{path.relative_to(folder / 'data')}": hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "data").rglob("*"))
            if path.is_file() and path.name != "claims.yml"  # the ledger's alone: no notebook reads it
        }
        self._index.closure([PACKAGE, *(self._module(name) for name in self._every_method)])

    def code(self, source: Path, methods: Iterable[str]) -> dict[str, str]:
        """The sha256 of every module and data file that a notebook depends on, by name.

        Args:
            source: the notebook.
            methods: methods whose records it shows; none means that it may use any.
        """
        named = {name for joined in methods for name in joined.split("+")}
        chosen = sorted(named) if named and named <= set(self._every_method) else self._every_method
        start = [*imports(source), *(f"{PACKAGE}.{name}" for name in CORE), *map(self._module, chosen)]
        return {**self._index.closure(start), **self._data}

    @staticmethod
    def _module(method: str) -> str:
        return f"{PACKAGE}.methods.{method}"


def count_statuses(records: Iterable[Any]) -> dict[str, int]:
    """Number of records by status."""
    return dict(sorted(Counter(record.status for record in records).items()))


def why(notebook: Notebook, parameters: Mapping[str, Any], sources: Sources) -> str:
    """Why a page must be run again; empty when it still holds.

    Args:
        notebook: the page's notebook.
        parameters: what it is to be run with.
        sources: the package as it is now.
    """
    stamp = Stamp.read(notebook.stamp)
    if stamp is None or not notebook.page.is_file():
        return "not run yet"
    if stamp.failure or stamp.statuses.get("error"):
        return "failed the last time"
    if stamp.source != source_hash(notebook.source):
        return "the notebook changed"
    if dict(stamp.parameters) != plain(parameters):
        return "its parameters changed"
    changed = changed_code(stamp.code, sources.code(notebook.source, stamp.methods))
    return f"changed: {changed}" if changed else ""


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as they are read back from a stamp."""
    return json.loads(json.dumps(dict(parameters)))


def changed_code(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Names of up to three modules or data files that were added, removed or changed; empty for none."""
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
