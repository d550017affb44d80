"""``kvrepro fetch papers``: the papers' own models and data, told beforehand, fetched and gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from huggingface_hub import constants

from kvrepro.cli_eval import completed
from kvrepro.papers import fetch as papers
from kvrepro.papers.table import Dataset, Model, entries, select, size
from kvrepro.texts import DATA_VARIABLE

_EXAMPLES = """\b
Examples:
  kvrepro fetch papers --dry-run              what, from where, how large, gated or not, here or not
  kvrepro fetch papers --to /data/papers      everything that the profile paper needs
  kvrepro fetch papers pg19 llama-2-7b        only these
  kvrepro fetch papers --check                compare the models' sha256 sums, too
"""


@click.command("papers", epilog=_EXAMPLES)
@click.argument("names", nargs=-1, shell_complete=completed(lambda: [entry.name for entry in entries()]))
@click.option("--all", "everything", is_flag=True, help="Also what no notebook reads yet.")
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Folder for the data.  [default: {DATA_VARIABLE}, else papers in kvrepro's cache]",
)
@click.option("--dry-run", is_flag=True, help="Only say what there is, what is missing and what it takes. No network.")
@click.option("--json", "as_json", is_flag=True, help="Only say the same as JSON.")
@click.option("--check", is_flag=True, help="Compare the models' sha256 sums, too (a minute or more).")
@click.option("--update", is_flag=True, help="Take the newest commit of what is named, instead of the known one.")
def papers_command(
    names: tuple[str, ...], everything: bool, to: Path | None, dry_run: bool, as_json: bool, check: bool, update: bool
) -> None:
    """Fetch the papers' own models and data: what the profile paper needs, or what is named.

    Says first what will be fetched, how much room it takes and which models are gated. Models go into the Hugging Face
    hub's cache (HF_HOME moves it), data into a folder in the layout that the notebooks read. Interrupted, the same
    command goes on where it stopped; what is whole is not fetched again.
    """
    if update and not names:
        raise click.UsageError("--update needs the names of what is to be renewed")
    folder = papers.Folder(papers.data_folder(to))
    states = papers.look(folder, select(names, everything), full=check)
    if as_json:
        click.echo(json.dumps(_as_dict(folder, states), indent=1))
        return
    _print_plan(folder, states)
    if dry_run:
        return
    if update or any(state.state != "here" for state in states):
        problems = papers.fetch(folder, states, update=update, say=click.echo)
        for problem in problems:
            click.echo(f"not fetched: {problem}", err=True)
        if problems:
            raise SystemExit(1)
    click.echo(f"All of it is here. To build the book from it:\n  export {DATA_VARIABLE}={folder.path}")
    click.echo("  HF_HUB_OFFLINE=1 make book PROFILE=paper    # offline: models stay at the commits fetched")


def _as_dict(folder: papers.Folder, states: Sequence[papers.State]) -> dict[str, Any]:
    return {
        "folder": str(folder.path),
        "hub_cache": constants.HF_HUB_CACHE,
        "disks": [
            asdict(disk) | {"where": [str(path) for path in disk.where]} for disk in papers.space(folder, states)
        ],
        "entries": [
            {
                **asdict(state.entry),
                "kind": state.entry.kind,
                "gated": state.entry.gated,
                "commit": folder.commit(state.entry),
                "download_bytes": state.entry.download,
                **({"memory_bytes": state.entry.memory} if isinstance(state.entry, Model) else {}),
                "state": state.state,
                "detail": state.detail,
                "missing_bytes": state.missing,
            }
            for state in states
        ],
    }


def _print_plan(folder: papers.Folder, states: Sequence[papers.State]) -> None:
    rows = [("name", "from", "commit", "download", "gated", "here?", "for")]
    rows += [_row(folder, state) for state in states]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    missing = size(sum(state.missing for state in states), exact=False)
    click.echo(f"\nTo download: {missing}. Data goes to {folder.path}, models to {constants.HF_HUB_CACHE}.")
    for disk in papers.space(folder, states):
        where = " and ".join(str(path) for path in disk.where)
        click.echo(f"Disk: {size(disk.needed)} needed, {size(disk.free)} free in {where}")
    models = [state.entry for state in states if isinstance(state.entry, Model)]
    if models:
        largest = max(models, key=lambda model: model.memory)
        click.echo(
            f"GPU: {size(largest.memory)} for the weights of {largest.name} and the full cache of one sequence of "
            f"{largest.context:,} tokens in bfloat16, by arithmetic; activations and batches come on top"
        )
    gated = [s.entry for s in states if isinstance(s.entry, Model) and s.entry.gated and s.state != "here"]
    if gated:
        click.echo("Gated: ask for access at each page below, make a token at the hub, then: hf auth login")
        for model in gated:
            click.echo(f"  {model.page}  ({model.licence})")
    click.echo()


def _row(folder: papers.Folder, state: papers.State) -> tuple[str, ...]:
    entry = state.entry
    purpose = entry.read_as if isinstance(entry, Dataset) else f"{len(entry.used_by)} notebooks"
    return (
        entry.name,
        entry.repo or "GitHub",
        folder.commit(entry)[:7],
        size(entry.download, entry.exact),
        "yes" if entry.gated else "no",
        f"{state.state} ({state.detail})" if state.detail else state.state,
        purpose if entry.used_by else "nothing yet",
    )
