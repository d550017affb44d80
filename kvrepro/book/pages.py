"""Pages and tables that the build writes: methods and their options, the notebooks, and the status page."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

import nbformat
from nbformat import NotebookNode

from kvrepro import methods, provenance
from kvrepro.book.files import write_if_changed
from kvrepro.book.parameters import defaults
from kvrepro.book.progress import duration
from kvrepro.book.project import PROFILES, Notebook, Project
from kvrepro.book.stamps import Stamp
from kvrepro.ledger import current, published
from kvrepro.papers.table import Dataset, Model, entries, size
from kvrepro.records import Record, read_records
from kvrepro.rules import RULES, Missing

BADGES = {"paper": "primary", "code": "primary-line", "second-hand": "warning", "ours": "success"}
_GLUE = re.compile(r"\{glue:text\}`[^`:]*?results/([^`:]+)\.ipynb::([^`:]+):([^`]*)`")
_STUB = "glue-stubs"
_MARK = re.compile(rf"^({'|'.join(BADGES)}):?\s*")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; pipes in the cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def code(value: object) -> str:
    """A value in backticks."""
    return f"`{value}`"


def _source(text: str) -> str:
    """Where a default comes from, with its first word as the book's mark."""
    match = _MARK.match(text)
    if not match:
        return text
    rest = text[match.end() :]
    return f"{{bdg-{BADGES[match[1]]}}}`{match[1]}`" + (f" {rest}" if rest else "")


def options_table(method: str) -> str:
    """The options of a method: default, choices, and where the default comes from."""
    rows = [
        [code(o.name), code(repr(o.default)), ", ".join(code(repr(c)) for c in o.choices), _source(o.source)]
        for o in methods.describe(method).options
    ]
    return markdown_table(["Option", "Default", "Choices", "Where the default comes from"], rows)


def methods_table() -> str:
    """All methods with their papers."""
    about = [methods.describe(name) for name in methods.names()]
    rows = [[code(d.name), d.kind, f"[{d.paper}]({d.url})" if d.url else d.paper] for d in about]
    return markdown_table(["Name", "Kind", "Paper"], rows)


def notebooks_table(notebooks: Sequence[Notebook]) -> str:
    """All notebooks with their parameters and the values of the quick profile."""
    rows = []
    for notebook in notebooks:
        values = {**defaults(notebook.source), **notebook.parameters("quick")}
        shown = ", ".join(code(f"{name}={value!r}") for name, value in values.items())
        rows.append([code(notebook.name), f"[{notebook.title}](results/{notebook.name}.ipynb)", shown])
    return markdown_table(["Notebook", "Title", "Parameters"], rows)


def profiles_table(notebooks: Sequence[Notebook], profile: str) -> str:
    """What a profile changes in each notebook."""
    rows = []
    for notebook in notebooks:
        changes = ", ".join(code(f"{name}={value!r}") for name, value in notebook.parameters(profile).items())
        rows.append([code(notebook.name), changes or "as the notebook is written"])
    return markdown_table(["Notebook", f"Changed by `{profile}`"], rows)


def variants_table(records: Sequence[Record]) -> str:
    """KVSlimmer as its code has it against KVSlimmer as printed, where both were measured on the same texts.

    Args:
        records: published ones.
    """
    rows = []
    for name, experiment, samples, each, better in (
        ("Divergence from the full cache, one shot", "same_bytes", "kl", "share", -1),
        ("Log-likelihood of LongBench's answers, in chunks", "longbench", "loglik", "task", 1),
    ):
        own = [r for r in records if r.cell.experiment == experiment and samples in r.value.extra]
        given = {"of": "kvslimmer(variant='released')", "against": ["kvslimmer"], "samples": samples, "each": each}
        try:
            found = sorted(RULES["difference"].judge(own, None, **given).comparisons, key=lambda c: c.mean)
        except Missing:
            continue
        span = " to ".join(f"{c} ({c.name.partition(f'{each} ')[2]})" for c in (found[0], found[-1]))
        wins, losses = (sum(c.sign() == sign for c in found) for sign in (better, -better))
        rows.append([name, f"{len(found)} {each}s", span, str(wins), str(losses)])
    header = ["Measure", "At", "Released minus paper, nats per token", "Released is better in", "Worse in"]
    return markdown_table(header, rows) if rows else "No published record compares the two.\n"


def papers_tables() -> str:
    """The papers' models and data: what is fetched from where, how large it is, and who reads it."""
    models = [entry for entry in entries() if isinstance(entry, Model)]
    datasets = [entry for entry in entries() if isinstance(entry, Dataset)]
    model_rows = [
        [code(m.name), _place(m), size(m.download), _memory(m), _gate(m), ", ".join(m.papers), _notebooks(m)]
        for m in models
    ]
    data_rows = [
        [code(d.name), _place(d), size(d.download, d.exact), d.read_as, ", ".join(d.papers), _notebooks(d)]
        for d in datasets
    ]
    last = ["Papers", "Notebooks"]
    model_table = markdown_table(
        ["Model", "From, at commit", "Download", "GPU memory", "Gated, licence", *last], model_rows
    )
    data_table = markdown_table(["Data", "From, at commit", "Download", "Read as", *last], data_rows)
    notes = [f"- {code(m.name)}: {m.note}\n" for m in models if m.note]
    for d in datasets:
        parts = [f"{d.title}.", f"Files: {_files(d)}.", d.note, f"Licence: {d.licence}."]
        notes.append(f"- {code(d.name)}: {' '.join(filter(None, parts))}\n")
    return f"{wide(model_table)}\n{wide(data_table)}\n{''.join(notes)}"


def _place(entry: Model | Dataset) -> str:
    """Repository and commit, with a link."""
    kind = "datasets/" if isinstance(entry, Dataset) else ""
    where = (
        f"[{entry.repo}](https://huggingface.co/{kind}{entry.repo}/tree/{entry.revision})" if entry.repo else "GitHub"
    )
    return f"{where} {code(entry.revision[:7])}{'' if entry.checked else ', not checked'}"


def _files(dataset: Dataset) -> str:
    return ", ".join(f"[{file.name}]({file.url})" if file.url else code(file.path) for file in dataset.files)


def _memory(model: Model) -> str:
    return f"{size(model.memory)} at {model.context:,} tokens"


def _gate(model: Model) -> str:
    return f"{f'[ask here]({model.page})' if model.gated else 'no'}; {model.licence}"


def _notebooks(entry: Model | Dataset) -> str:
    return str(len(entry.used_by)) if entry.used_by else "none yet"


def write_generated(project: Project, notebooks: Sequence[Notebook]) -> None:
    """Write the tables that the chapters include, under ``book/_generated``."""
    folder = project.book / "_generated"
    for name in methods.names():
        write_if_changed(folder / "options" / f"{name}.md", options_table(name))
    write_if_changed(folder / "methods.md", methods_table())
    write_if_changed(folder / "variants.md", variants_table(published()))
    write_if_changed(folder / "papers.md", papers_tables())
    write_if_changed(folder / "notebooks.md", notebooks_table(notebooks))
    profiles = [f"### {name}\n\n{about}.\n\n{profiles_table(notebooks, name)}\n" for name, about in PROFILES.items()]
    write_if_changed(folder / "profiles.md", "".join(profiles))


def status_page(project: Project, notebooks: Sequence[Notebook], comparison: str = "") -> str:
    """The status page: what the pages were made with, when, and how long it took.

    It depends on what was run and on the checkout alone, so that it changes only when one of them does.

    Args:
        project: the checkout.
        notebooks: all of its notebooks.
        comparison: what came of comparing the values here with the published ones, in a sentence.
    """
    stamps = {notebook.name: Stamp.read(notebook.stamp) for notebook in notebooks}
    ran = [stamp for stamp in stamps.values() if stamp]
    return "\n".join(
        [
            "# Status\n",
            "What the results pages of this copy of the book were made with. This page is written by the build.\n",
            _made_with(project, ran),
            f"{comparison}\n",
            "## Notebooks\n",
            wide(_runs_table(notebooks, stamps)),
            "## Records\n",
            "One record is one measured value with everything it depends on; see [how to rerun](rerun.md).\n",
            wide(_records_table(notebooks)),
            "## Published records\n",
            "The records that the project calls its own, which the ledger judges, one a cell. *Other code*: how many "
            "were measured by another version of the code than is here. *Other data*: how many are of another version "
            "of the text, or of other weights, than a page of this copy read under the same name.\n",
            wide(published_table(published(), notebooks)),
        ]
    )


def wide(table: str, kind: str = "") -> str:
    """A table that scrolls on its own where the page is too narrow for it; ``kind`` is a further CSS class."""
    return f"::::{{div}} {f'wide {kind}'.strip()}\n{table}::::\n"


def _made_with(project: Project, stamps: Sequence[Stamp]) -> str:
    commit, dirty = provenance.commit(project.root)
    newest = max(stamps, key=lambda stamp: stamp.environment.get("date", ""), default=None)
    about = newest.environment if newest else {}
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items() if version)
    rows = [
        ["profile", ", ".join(sorted({code(stamp.profile) for stamp in stamps})) or "nothing was run yet"],
        ["last computed", _when(about.get("date", "")) or "never"],
        ["commit of this copy", _commit(commit, dirty)],
        ["machine", f"{provenance.cpu_name()}, {os.cpu_count()} CPU cores, {_memory_gib():.0f} GiB"],
        ["device", ", ".join(sorted({stamp.environment.get("device", "unknown") for stamp in stamps})) or "none yet"],
        ["versions", versions or "unknown"],
        ["run times of the notebooks, added up", duration(sum(stamp.seconds for stamp in stamps))],
    ]
    return markdown_table(["What", "This copy"], rows)


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _commit(commit: str | None, dirty: bool | None) -> str:
    if commit is None:
        return "none"
    return code(commit[:12]) + (" (with changes)" if dirty else "")


def _when(date: str) -> str:
    return f"{date[:16].replace('T', ' ')} UTC" if date else ""


def _runs_table(notebooks: Sequence[Notebook], stamps: dict[str, Stamp | None]) -> str:
    rows = []
    for notebook in notebooks:
        stamp = stamps[notebook.name]
        link = f"[{notebook.title}](results/{notebook.name}.ipynb)"
        if stamp is None:
            rows.append([link, "not run yet", "", "", "", ""])
            continue
        where = stamp.environment
        counts = ", ".join(f"{n} {status}" for status, n in stamp.statuses.items()) or "none"
        state = f"**failed**: {stamp.failure.splitlines()[0]}" if stamp.failure else duration(stamp.seconds)
        commit = _commit(where.get("commit"), where.get("dirty"))
        rows.append([link, stamp.profile, state, counts, _when(where.get("date", "")), commit])
    return markdown_table(["Page", "Profile", "Took", "Records", "Run", "Commit"], rows)


def _records_table(notebooks: Sequence[Notebook]) -> str:
    rows = []
    for notebook in notebooks:
        records = read_records(notebook.records) if notebook.records.is_file() else []
        if records:
            rows.append(
                [
                    f"{{download}}`{notebook.name} <results/{notebook.name}.records.jsonl>`",
                    ", ".join(sorted({record.cell.metric for record in records})),
                    _texts(records),
                    str(len(records)),
                    duration(sum(record.provenance["wall_s"] for record in records)),
                    f"{max(record.provenance['peak_bytes'] for record in records) / 2**30:.2f} GiB",
                ]
            )
    return markdown_table(["Download", "Metrics", "Model and texts", "Records", "Measured in", "Peak memory"], rows)


def published_table(records: Sequence[Record], notebooks: Sequence[Notebook]) -> str:
    """What was published, by experiment, and how much of it the present code and data would still give.

    Args:
        records: published ones.
        notebooks: their own records tell which texts and weights this copy has.
    """
    here = [r for notebook in notebooks if notebook.records.is_file() for r in read_records(notebook.records)]
    read: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for record in here:
        read.setdefault(_names(record), set()).add(_sums(record))
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.cell.paper, record.cell.experiment), []).append(record)
    rows = []
    for (paper, experiment), group in sorted(groups.items()):
        other = sum(_sums(r) not in read.get(_names(r), {_sums(r)}) for r in group)
        stale = sum(not current(r) for r in group)
        commits = ", ".join(sorted({_commit(r.provenance.get("commit"), r.provenance.get("dirty")) for r in group}))
        devices = ", ".join(sorted({str(r.provenance.get("device")) for r in group}))
        rows.append([f"{paper}/{experiment}", str(len(group)), str(stale or ""), str(other or ""), commits, devices])
    return markdown_table(["Experiment", "Records", "Other code", "Other data", "Commit", "Device"], rows)


def _names(record: Record) -> tuple[str, ...]:
    """What a record's model and text are called."""
    return record.cell.paper, record.cell.model, record.cell.data


def _sums(record: Record) -> tuple[str, ...]:
    """What they are."""
    return record.cell.model_sha256, record.cell.data_sha256


def _texts(records: Sequence[Record]) -> str:
    models = sorted({record.cell.model for record in records})
    data = sorted({record.cell.data for record in records})
    return f"{', '.join(models)}; {', '.join(data)}"


def placeholder(notebook: Notebook) -> NotebookNode:
    """A page in place of a notebook that was not run yet."""
    text = (
        f"# {notebook.title}\n\n:::{{warning}}\nThis notebook was not run yet: `make book` runs all of them, "
        f"`kvrepro build --notebook {notebook.name}` this one.\n:::"
    )
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text, id="not-run-yet")])
    page.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return page


def glued_in_prose(project: Project) -> dict[str, dict[str, str]]:
    """What the chapters show of the results pages: ``{notebook: {key: format}}``."""
    found: dict[str, dict[str, str]] = {}
    for chapter in sorted(project.book.rglob("*.md")):
        for name, key, form in _GLUE.findall(chapter.read_text(encoding="utf-8")):
            found.setdefault(name, {})[key] = form
    return found


def fill_glue(page: NotebookNode, wanted: Mapping[str, str]) -> None:
    """Give a page that was not run, or that failed, what the chapters show of it: "not run yet", or not a number.

    Args:
        page: changed in place.
        wanted: formats by key; those that end in ``s`` are texts.
    """
    page.cells = [cell for cell in page.cells if cell.get("id") != _STUB]
    there = {
        output.metadata["scrapbook"]["name"]
        for cell in page.cells
        for output in cell.get("outputs", [])
        if "scrapbook" in output.get("metadata", {})
    }
    missing = {key: form for key, form in wanted.items() if key not in there}
    if missing:
        cell = nbformat.v4.new_code_cell("", id=_STUB, metadata={"tags": ["remove-cell"]})
        cell["outputs"] = [
            _stub(key, "'not run yet'" if form.endswith("s") else "nan") for key, form in missing.items()
        ]
        page.cells.append(cell)


def _stub(key: str, text: str) -> NotebookNode:
    """An output as ``myst_nb.glue`` leaves it."""
    prefix = "application/papermill.record/"
    about = {"scrapbook": {"name": key, "mime_prefix": prefix}}
    return nbformat.v4.new_output("display_data", data={f"{prefix}text/plain": text}, metadata=about)
