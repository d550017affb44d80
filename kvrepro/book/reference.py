"""Keep the quick profile's values as what other machines are compared with: ``python -m kvrepro.book.reference``.

Without arguments the values are those of the book's own pages, which must have been run with the quick profile; with
folders or files of records, such as those measured on a GPU in float32, they are these.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvrepro.book.compare_page import comparable
from kvrepro.book.project import BookError, Project
from kvrepro.book.stamps import Stamp
from kvrepro.records import Record, Store, read_records, write_records

FOLDER = "quick"


def of_pages(project: Project, profile: str = FOLDER) -> list[Record]:
    """The records of all pages that were run with a profile.

    Args:
        project: the checkout.
        profile: the profile.

    Raises:
        BookError: a page was not run with it, or failed.
    """
    found = []
    for notebook in project.notebooks():
        stamp = Stamp.read(notebook.stamp)
        if stamp is None or stamp.failure or stamp.profile != profile:
            raise BookError(
                f"{notebook.name} was not run with the profile {profile}: kvrepro build --profile {profile}"
            )
        found += read_records(notebook.records) if notebook.records.is_file() else []
    return found


def keep(records: Iterable[Record], folder: Path) -> list[Record]:
    """Write the records that other machines can be compared with, one file a paper; newer ones replace a cell's.

    Args:
        records: measured ones; times, arrays and what failed are left out.
        folder: where they are kept.

    Returns:
        All that the folder then holds.

    Raises:
        BookError: a record of a tree with changes, which nobody could measure again.
    """
    chosen = [record for record in records if comparable(record)]
    if dirty := [record.cell.label() for record in chosen if record.provenance.get("dirty")]:
        raise BookError(f"commit first: {len(dirty)} records were measured with changes, the first is {dirty[0]}")
    there = [record for path in sorted(folder.glob("*.jsonl")) for record in read_records(path)]
    every = sorted([*there, *chosen], key=lambda record: record.provenance["date"])
    newest = list({record.cell.identity: record for record in every}.values())
    for paper in sorted({record.cell.paper for record in newest}):
        write_records(folder / f"{paper}.jsonl", [record for record in newest if record.cell.paper == paper])
    return newest


def main(arguments: Sequence[str]) -> None:
    """Keep the records of the pages, or of the folders and files named."""
    published = Store.default().published_folder
    if published is None:
        raise BookError("there is no folder of published records here")
    paths = [file for name in arguments for file in _files(Path(name))]
    records = [r for path in paths for r in read_records(path)] if arguments else of_pages(Project.find())
    kept = keep(records, published / FOLDER)
    print(f"{len(kept)} values in {published / FOLDER}")


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.jsonl")) if path.is_dir() else [path]


if __name__ == "__main__":
    main(sys.argv[1:])
