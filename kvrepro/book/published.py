"""The published pages: the notebooks as they ran on the project's GPU, beside those of the reader's machine.

``python -m kvrepro.book.published`` keeps the pages of a build with the ``gpu`` profile, and their records, in
``results/published``, from where every build puts them into the book. With ``--draw`` it runs the notebooks that are
named again on the published records: the figures and texts are new, nothing is measured, and no GPU is needed.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from kvrepro.book.execute import cell_id, environment, execute, note
from kvrepro.book.files import write_if_changed
from kvrepro.book.pages import code
from kvrepro.book.parameters import check, defaults
from kvrepro.book.project import BookError, Notebook, Project
from kvrepro.book.stamps import Sources, Stamp, source_hash
from kvrepro.executors import STORED, VARIABLE
from kvrepro.ledger import current, newest
from kvrepro.records import Record, read_records, write_records

PROFILE = "gpu"
#: The way from a page to the folder of the chapters: pages are called paper/name and lie one folder below it.
_UP = "../../"
_LABEL = re.compile(r"^\(([\w-]+)\)=$", re.MULTILINE)
_PAGE = re.compile(r"\]\(([^)#\s:]+\.ipynb)")


def folder(project: Project) -> Path:
    """Where the published records and pages are kept."""
    return project.root / "results" / "published"


def kept(project: Project, notebook: Notebook) -> Path:
    """Where a notebook's published page is kept, whether there is one or not."""
    return folder(project) / "pages" / f"{notebook.name}.ipynb"


def shown(project: Project, notebook: Notebook) -> Path:
    """Where the build puts it for the book."""
    return project.book / "published" / f"{notebook.name}.ipynb"


def published_notebooks(project: Project, notebooks: Sequence[Notebook]) -> list[Notebook]:
    """The notebooks that have a published page."""
    return [notebook for notebook in notebooks if kept(project, notebook).is_file()]


def keep(project: Project, names: Sequence[str] = ()) -> tuple[list[str], list[Record]]:
    """Keep the pages that were run with the ``gpu`` profile as the published ones, and their records.

    A page whose parameters are the quick profile's, too, says nothing new and is left out; so is one that shows itself
    what is published (``twin: false`` in the index), whose copy would show an older state of it.

    Args:
        project: the checkout.
        names: only these notebooks; all by default.

    Returns:
        The pages kept, and all records that are published then.

    Raises:
        BookError: none was run with that profile, one failed, or the tree had changes that nobody else has.
    """
    chosen = [
        (notebook, stamp)
        for notebook in project.select(names)
        if (stamp := Stamp.read(notebook.stamp)) and stamp.profile == PROFILE
    ]
    if not chosen:
        raise BookError(f"no page was run with the profile {PROFILE}: kvrepro build --profile {PROFILE}")
    for notebook, stamp in chosen:
        if stamp.failure or stamp.environment.get("dirty"):
            raise BookError(f"{notebook.name} is not published: {stamp.failure or 'commit the changes first'}")
    records = [r for notebook, _ in chosen if notebook.records.is_file() for r in read_records(notebook.records)]
    pages = [
        notebook
        for notebook, stamp in chosen
        if notebook.twin and dict(stamp.parameters) != notebook.parameters("quick")
    ]
    for notebook in pages:
        target = kept(project, notebook)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(notebook.page, target)
        shutil.copyfile(notebook.stamp, target.with_suffix(".stamp.json"))
    every = merged(_published(project), records)
    for paper in sorted({record.cell.paper for record in every}):
        write_records(folder(project) / f"{paper}.jsonl", [record for record in every if record.cell.paper == paper])
    return [notebook.name for notebook in pages], every


def draw(project: Project, names: Sequence[str]) -> list[str]:
    """Run published notebooks again, as they are now, on the published records; nothing is measured.

    Args:
        project: the checkout, without changes.
        names: the notebooks; the texts they read must be on this machine.

    Returns:
        The pages drawn.

    Raises:
        BookError: a value is not among the published records, or the tree has changes that nobody else has.
    """
    from kvrepro.book.build import keep as keep_page  # the build stages these pages

    sources, drawn = Sources(), []
    for notebook in project.select(names):
        target = replace(notebook, page=kept(project, notebook))
        parameters = check(notebook.name, defaults(notebook.source), notebook.parameters(PROFILE))
        with tempfile.TemporaryDirectory(prefix="kvrepro-") as results:
            for path in folder(project).glob("*.jsonl"):
                shutil.copy(path, results)
            with environment({"KVREPRO_RESULTS": results, VARIABLE: STORED}):
                outcome = execute(project, notebook, parameters)
        if outcome.failure or outcome.environment.get("dirty"):
            raise BookError(f"{notebook.name} is not drawn: {outcome.failure or 'commit the changes first'}")
        keep_page(target, parameters, outcome, PROFILE, sources)
        target.records.unlink(missing_ok=True)  # they are in the files of all records
        drawn.append(notebook.name)
    return drawn


def merged(there: Iterable[Record], more: Iterable[Record]) -> list[Record]:
    """Published records and new ones, one a cell, oldest first.

    A record of other code than the present goes once its experiment has one of the present code for the same method.

    Args:
        there: what is published.
        more: what was measured; failures are left out.

    Raises:
        BookError: a record of a tree with changes.
    """
    done = [record for record in more if record.status in ("ok", "skipped")]
    if dirty := [record.cell.label() for record in done if record.provenance.get("dirty")]:
        raise BookError(f"commit first: {len(dirty)} records were measured with changes, the first is {dirty[0]}")
    every = newest([*there, *done])
    fresh = {_kind(record) for record in every if current(record)}
    left = [record for record in every if current(record) or _kind(record) not in fresh]
    return sorted(left, key=lambda record: record.provenance["date"])


def _kind(record: Record) -> tuple[str, ...]:
    """Experiment and method."""
    cell = record.cell
    return cell.paper, cell.experiment, str(cell.params.get("label", cell.method)), str(cell.params.get("peer", ""))


def stage_published(project: Project, notebooks: Sequence[Notebook]) -> None:
    """Put the published pages into the book, each with a note on where it comes from.

    Args:
        project: the checkout.
        notebooks: all of its notebooks.
    """
    known = {record.key: record for record in newest(_published(project))}
    for notebook in published_notebooks(project, notebooks):
        page = nbformat.read(kept(project, notebook), as_version=4)
        stamp = Stamp.read(kept(project, notebook).with_suffix(".stamp.json"))
        if stamp is None:
            raise BookError(f"{kept(project, notebook)} has no stamp beside it: publish it again")
        _rename(page, f"{notebook.title}: published", notebook.name)
        note(page, *_about(notebook, stamp, known))
        page.cells.append(_sources(notebook))
        write_if_changed(shown(project, notebook), nbformat.writes(page) + "\n")


def _published(project: Project) -> list[Record]:
    return [record for path in sorted(folder(project).glob("*.jsonl")) for record in read_records(path)]


def _rename(page: NotebookNode, title: str, name: str) -> None:
    """Give a page its own title and labels, and take out what only the reader's own page may have."""
    page.cells = [cell for cell in page.cells if cell.get("id") != cell_id("downloads", 0)]
    labels = {label for cell in page.cells if cell.cell_type == "markdown" for label in _LABEL.findall(cell.source)}

    def own(text: str) -> str:
        """A text with links that hold from where the page is now; other notebooks' pages are the reader's own."""
        text = _LABEL.sub(r"(published-\1)=", text)
        for label in labels:
            text = text.replace(f"](#{label})", f"](#published-{label})")
        return _PAGE.sub(lambda m: f"]({_UP}{posixpath.normpath(f'results/{name}/../{m[1]}')}", text)

    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell["source"] = own(cell.source)
            continue
        cell["outputs"] = [output for output in cell.outputs if _belongs(output)]
        for output in cell.outputs:
            if "text/markdown" in output.get("data", {}):
                output["data"]["text/markdown"] = own(output["data"]["text/markdown"])
    page.cells[0]["source"] = re.sub(r"\A# .*", f"# {title}", page.cells[0].source)


def _belongs(output: NotebookNode) -> bool:
    """Whether an output is for readers: neither glue nor what another machine's libraries logged."""
    return "scrapbook" not in output.get("metadata", {}) and output.get("name") != "stderr"


def _about(notebook: Notebook, stamp: Stamp, known: dict[str, Record]) -> tuple[str, str]:
    """Kind and text of the note on a published page."""
    records = [known[key] for key in stamp.records if key in known]
    devices = sorted({str(record.provenance.get("device")) for record in records})
    commits = sorted({str(record.provenance.get("commit"))[:8] for record in records})
    text = (
        f"**Published**: the profile `{stamp.profile}`, measured on {', '.join(devices) or 'an unknown device'} "
        f"(commit {', '.join(map(code, commits)) or 'unknown'}). "
        f"[The same page as your machine made it]({_UP}results/{notebook.name}.ipynb)."
    )
    gone, stale = len(stamp.records) - len(records), sum(not current(record) for record in records)
    reasons = [
        f"{stale} of its {len(stamp.records)} values were measured by other code than is here now" if stale else "",
        f"{gone} of them have been measured again since" if gone else "",
        "its notebook has been changed since" if stamp.source != source_hash(notebook.source) else "",
    ]
    if found := "; ".join(filter(None, reasons)):
        return "warning", f"{text}\n\n**It is out of date**: {found}."
    return "note", text


def link(project: Project, notebook: Notebook) -> str:
    """A sentence for the reader's own page that leads to the published one; empty where there is none."""
    if not kept(project, notebook).is_file():
        return ""
    return f"This page was made on your machine. [The published run]({_UP}published/{notebook.name}.ipynb)."


def _sources(notebook: Notebook) -> NotebookNode:
    """Links to what made the page."""
    paper = notebook.name.partition("/")[0]
    text = (
        f"**Behind this page:** {{download}}`the notebook </notebooks/{notebook.name}.ipynb>`, "
        f"{{download}}`the published records </results/published/{paper}.jsonl>` (one JSON line a value). On a machine "
        f"with a GPU: `make notebook NB={notebook.name} PROFILE={PROFILE}`."
    )
    return nbformat.v4.new_markdown_cell(text, id=cell_id("published", 0))


def main(arguments: Sequence[str]) -> None:
    """Keep the pages of the build, or draw those named again."""
    project, names = Project.find(), [word for word in arguments if word != "--draw"]
    if "--draw" in arguments:
        print(f"drawn again: {', '.join(draw(project, names))}")
        return
    pages, every = keep(project, names)
    print(f"{len(pages)} pages and {len(every)} records are published: {', '.join(pages)}")


if __name__ == "__main__":
    main(sys.argv[1:])
