"""Build the pages with Jupyter Book, without a warning, and only when something they show changed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode

from kvrepro.book.compare_page import compare_page, compared, summary
from kvrepro.book.decide_page import published_parts
from kvrepro.book.execute import note
from kvrepro.book.files import write_if_changed, write_text
from kvrepro.book.ledger_page import ledger_page
from kvrepro.book.pages import fill_glue, glued_in_prose, placeholder, status_page, write_generated
from kvrepro.book.project import BookError, Notebook, Project
from kvrepro.book.published import link, published_notebooks, shown, stage_published
from kvrepro.book.stamps import Sources, Stamp, why
from kvrepro.fingerprint import PACKAGE_DIR

_COMMAND = ["build", ".", "--path-output", ".", "--all", "--keep-going", "-n"]
_WARNING = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b")
#: Pages that the build writes, by their names in the table of contents.
_WRITTEN = ("book/status", "book/ledger", "book/compare")
_TOOLS = ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "pydata-sphinx-theme", "sphinxcontrib-bibtex")


def check_toc(project: Project, notebooks: Sequence[Notebook]) -> None:
    """Make sure that the table of contents lists every notebook's pages, and no page of a notebook that is not there.

    Raises:
        BookError: they disagree, or a chapter is missing.
    """
    listed = set(toc_files(project))
    prefixes = ("book/results/", "book/published/")
    pages = [notebook.page for notebook in notebooks]
    pages += [shown(project, notebook) for notebook in published_notebooks(project, notebooks)]
    wanted = {page.relative_to(project.root).with_suffix("").as_posix() for page in pages}
    problems = [f"add {name} to _toc.yml" for name in sorted(wanted - listed)]
    unknown = sorted(name for name in listed - wanted if name.startswith(prefixes))
    problems += [f"take {name} out of _toc.yml" for name in unknown]
    for name in sorted(name for name in listed if not name.startswith(prefixes) and name not in _WRITTEN):
        if not any((project.root / f"{name}{suffix}").is_file() for suffix in (".md", ".ipynb", ".rst")):
            problems.append(f"write {name}.md, or take it out of _toc.yml")
    if problems:
        raise BookError("_toc.yml and notebooks/index.yml disagree: " + "; ".join(problems))


def toc_files(project: Project) -> list[str]:
    """Every page in the table of contents, in order, the front page first.

    Raises:
        BookError: ``_toc.yml`` cannot be read.
    """
    try:
        toc = yaml.safe_load((project.root / "_toc.yml").read_text(encoding="utf-8"))
        return [toc["root"], *_files(toc)]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise BookError(f"cannot read {project.root / '_toc.yml'}: {error}") from error


def _files(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if "file" in node:
            yield node["file"]
        for key in ("parts", "chapters", "sections"):
            yield from _files(node.get(key, []))
    elif isinstance(node, list):
        for item in node:
            yield from _files(item)


def stage(project: Project, notebooks: Sequence[Notebook], sources: Sources) -> list[str]:
    """Bring everything that is generated up to date: tables, status, ledger, advice, comparison, notes on stale pages.

    Args:
        project: the checkout.
        notebooks: all of its notebooks.
        sources: the package as it is now.

    Returns:
        Names of the pages whose notebooks were not run yet.
    """
    missing = []
    wanted = glued_in_prose(project)
    for notebook in notebooks:
        stamp = Stamp.read(notebook.stamp)
        if stamp is None or not notebook.page.is_file():
            missing.append(notebook.name)
            page = placeholder(notebook)
        else:
            page = nbformat.read(notebook.page, as_version=4)
            _mark(page, notebook, stamp, sources, link(project, notebook))
        if stamp is None or stamp.failure:
            fill_glue(page, wanted.get(notebook.name, {}))
        write_if_changed(notebook.page, nbformat.writes(page) + "\n")
    stage_published(project, notebooks)
    write_generated(project, notebooks)
    found = compared(notebooks)
    write_if_changed(project.book / "_generated" / "machine.md", summary(found, "compare.md") + "\n")
    write_if_changed(project.book / "compare.md", compare_page(found, {nb.name: nb.title for nb in notebooks}))
    write_if_changed(project.book / "status.md", status_page(project, notebooks, summary(found, "compare.md")))
    shown_as_published = [notebook.name for notebook in published_notebooks(project, notebooks)]
    write_if_changed(project.book / "ledger.md", ledger_page(published=shown_as_published))
    published_parts(shown_as_published).write(project.book / "_generated" / "decide")
    return missing


def _mark(page: NotebookNode, notebook: Notebook, stamp: Stamp, sources: Sources, more: str) -> None:
    """Put a note on a page: that it failed, that it no longer holds for the profile it was run for, or `more`."""
    if stamp.failure:
        text = f"**This notebook failed**, so the page ends where it stopped.\n\n```text\n{stamp.failure}\n```"
        note(page, "danger", text)
    elif broken := stamp.statuses.get("error"):
        note(page, "danger", f"**{broken} of the values of this page could not be measured**; their records say why.")
    elif reason := why(notebook, notebook.profiles.get(stamp.profile, {}), sources):
        note(page, "warning", f"**This page is out of date** ({reason}): `make book` runs it again.")
    else:
        note(page, "note", more)


def build_site(project: Project, strict: bool) -> bool:
    """Build the HTML pages, unless nothing that they show changed.

    Args:
        project: the checkout, staged.
        strict: whether a warning is an error, as it is when every notebook ran.

    Returns:
        Whether the pages were built; False when they were up to date.

    Raises:
        BookError: Jupyter Book failed or, when strict, warned.
    """
    stamp = project.work / "site.stamp"
    inputs = _inputs(project)
    if project.front.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == inputs:
        return False
    stamp.unlink(missing_ok=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", *_COMMAND]
    done = subprocess.run(
        [*command, "-W"] if strict else command,
        cwd=project.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    log = project.work / "jupyter-book.log"
    write_text(log, done.stdout)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if _WARNING.search(line)] or done.stdout.splitlines()[-15:]
        shown = "\n".join(f"  {line}" for line in lines[:30])
        raise BookError(f"Jupyter Book failed (all of it is in {log}):\n{shown}")
    if strict:
        write_text(stamp, inputs)
    return True


def _inputs(project: Project) -> str:
    """The sha256 of every file that the pages are made from, and of the versions of the tools that make them."""
    digest = hashlib.sha256()
    for tool in _TOOLS:
        digest.update(f"{tool} {metadata.version(tool)}\n".encode())
    folders = (project.book, project.root / "notebooks")
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if _is_input(path)]
    files += [project.root / "_config.yml", project.root / "_toc.yml"]
    files += sorted(PACKAGE_DIR.rglob("*.py"))  # the page of public names is made from its docstrings
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{os.path.relpath(path, project.root)} {content}\n".encode())
    return digest.hexdigest()


def _is_input(path: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts[-3:])
    return path.is_file() and not hidden and not path.name.endswith(".stamp.json")


def outside_references(html: Path) -> list[str]:
    """What the built pages would load from elsewhere: ``file: tag address``, empty for a site that stands alone.

    Args:
        html: folder of the built site.
    """
    loads = re.compile(
        r"<(script|link|img|iframe|source|video|audio|object|embed)\b[^>]*?\b(?:src|href|data)\s*=\s*[\"']?"
        r"((?:https?:)?//[^\"'\s>]+)",
        re.IGNORECASE,
    )
    harmless = re.compile(r"<link\b[^>]*\brel\s*=\s*[\"']?(?:canonical|license|author)\b", re.IGNORECASE)
    imports = re.compile(r"@import\s+(?:url\()?[\"']?((?:https?:)?//[^\"')\s]+)|url\([\"']?((?:https?:)?//[^\"')\s]+)")
    found = []
    for page in sorted(html.rglob("*.html")):
        for match in loads.finditer(page.read_text(encoding="utf-8")):
            if not harmless.match(match[0]):
                found.append(f"{page.relative_to(html)}: {match[1]} {match[2]}")
    for sheet in sorted(html.rglob("*.css")):
        for match in imports.finditer(sheet.read_text(encoding="utf-8", errors="replace")):
            found.append(f"{sheet.relative_to(html)}: css {match[1] or match[2]}")
    return found
