"""Run notebooks through papermill with this interpreter, also several at a time, and leave clean pages."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from kvrepro.book.project import Notebook, Project
from kvrepro.records import Record, read_records

_KERNEL = "python3"
_COMMAND = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--HistoryManager.enabled=False"]
_COMMAND.append("--log-level=50")  # its remarks on encryption are not about us
_EXPORT = "kvrepro-export"
_NOTE = "kvrepro-note"
_PROGRESS_BAR = re.compile(r"[^\r\n]*\r|[^\r\n]*\|[^\r\n]*\[[^\r\n]*(?:it/s|s/it|<)[^\r\n]*\][^\r\n]*\n?")


@dataclass(frozen=True)
class Outcome:
    """What came of running a notebook.

    Attributes:
        notebook: the notebook as it ran, clean.
        seconds: how long it ran.
        failure: kind and message of the error that stopped it, empty when it went through.
        records: the records it used.
        environment: commit, dirty, device, threads, versions.
    """

    notebook: NotebookNode
    seconds: float
    failure: str = ""
    records: list[Record] = field(default_factory=list)
    environment: Mapping[str, Any] = field(default_factory=dict)


class Kernels:
    """The kernels that were started, so that one thread can end what others wait for.

    Attributes:
        killed: whether :meth:`kill` was called; a kernel that is started later ends at once.
    """

    def __init__(self) -> None:
        """None yet."""
        self.killed = False
        self._managers: list[AsyncKernelManager] = []

    def manager(self, environment: Mapping[str, str]) -> type[AsyncKernelManager]:
        """What starts one kernel: of this very interpreter, whatever kernels the user has installed.

        Args:
            environment: variables that the kernel has beside those of this process.
        """
        kernels = self

        class Manager(AsyncKernelManager):
            kernel_spec = KernelSpec(argv=_COMMAND, env=dict(environment), display_name="Python 3", language="python")

            async def start_kernel(self, **options: Any) -> None:
                kernels._managers.append(self)
                await super().start_kernel(**options)
                if kernels.killed:
                    await self.provisioner.kill()

        return Manager

    def kill(self) -> None:
        """Kill all that run: whoever waits for one of them learns that it died."""
        self.killed = True
        for manager in self._managers:
            if manager.provisioner is not None:
                asyncio.run(manager.provisioner.kill())


def execute(
    project: Project,
    notebook: Notebook,
    parameters: Mapping[str, Any],
    progress: Path | None = None,
    *,
    threads: int | None = None,
    kernels: Kernels | None = None,
    times: bool = True,
) -> Outcome:
    """Run a notebook in a kernel of this interpreter, from the project's root.

    Args:
        project: the checkout.
        notebook: which one.
        parameters: what differs from the parameters cell; checked before.
        progress: file that sweeps append their progress to, see ``kvrepro.records.Store.sweep``.
        threads: threads that torch may use; None for as many as it takes by itself.
        kernels: where its kernel can be ended from another thread.
        times: whether times are measured; otherwise it ends at the first that is not stored, with ``TimesLater``.

    Returns:
        The outcome; an error inside the notebook is part of it and not raised.
    """
    with tempfile.TemporaryDirectory(prefix="kvrepro-") as folder:
        scratch = Path(folder)
        before, after = scratch / "before.ipynb", scratch / "after.ipynb"
        nbformat.write(_with_export(nbformat.read(notebook.source, as_version=4), scratch), before)
        manager = (kernels or Kernels()).manager(_kernel_environment(scratch, progress, threads, times))
        started = time.perf_counter()
        failure = _papermill(before, after, parameters, project.root, manager)
        seconds = time.perf_counter() - started
        ran = nbformat.read(after if after.is_file() else before, as_version=4)
        records_file, environment_file = scratch / "records.jsonl", scratch / "environment.json"
        return Outcome(
            notebook=clean(ran, project.root),
            seconds=seconds,
            failure=failure,
            records=read_records(records_file) if records_file.is_file() else [],
            environment=json.loads(environment_file.read_text()) if environment_file.is_file() else {},
        )


def _papermill(
    before: Path, after: Path, parameters: Mapping[str, Any], root: Path, manager: type[AsyncKernelManager]
) -> str:
    """Kind and message of what stopped the notebook, or nothing."""
    # It warns of parameters cells that it cannot read, which kvrepro.book.parameters has checked, and of dead kernels.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    try:
        papermill.execute_notebook(
            before,
            after,
            parameters=dict(parameters),
            kernel_name=_KERNEL,
            language="python",
            progress_bar=False,
            start_timeout=300,
            autosave_cell_every=0,
            kernel_manager_class=manager,
            resources={"metadata": {"path": str(root)}},  # not cwd=: it moves this whole process, other threads too
        )
    except PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue}".strip(": ")
    except DeadKernelError:
        return "the kernel died, as it does when the machine runs out of memory"
    except RuntimeError as error:
        return f"the kernel could not be used: {error}"
    return ""


def _kernel_environment(scratch: Path, progress: Path | None, threads: int | None, times: bool) -> dict[str, str]:
    """What a kernel's environment has beside this process's."""
    package = str(Path(__file__).resolve().parents[2])
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "IPYTHONDIR": str(scratch / "ipython"),  # no start-up files of the user's
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        # torch's threads wait for each other asleep, not spinning: alone hardly slower, on a busy machine twice as fast
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # tqdm, imported by transformers, asks for ipywidgets, whose scripts the pages would load from a CDN
        "PYTHONWARNINGS": ",".join(filter(None, ["ignore:IProgress not found", os.environ.get("PYTHONWARNINGS")])),
    }
    if progress is not None:
        changes["KVREPRO_PROGRESS"] = str(progress)
    if not times:
        changes["KVREPRO_TIMES"] = "later"
    if threads is not None:
        changes["OMP_NUM_THREADS"] = str(threads)
    if results := os.environ.get("KVREPRO_RESULTS"):
        changes["KVREPRO_RESULTS"] = str(Path(results).resolve())
    return changes


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that hold inside, for this process and those that it starts."""
    saved = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _with_export(notebook: NotebookNode, scratch: Path) -> NotebookNode:
    """The notebook with a last cell that hands over its records; ``clean`` takes it out again."""
    cell = nbformat.v4.new_code_cell(f"from kvrepro.book.kernel import export\n\nexport({str(scratch)!r})")
    cell.metadata["tags"] = [_EXPORT]
    notebook.cells.append(cell)
    return notebook


def clean(notebook: NotebookNode, root: Path) -> NotebookNode:
    """An executed notebook without what changes from run to run or belongs to this machine.

    Takes out papermill's metadata and markers, times, progress bars, our own last cell, and absolute paths in texts.

    Args:
        notebook: as papermill left it; changed in place.
        root: the checkout, whose path is cut from texts.
    """
    drop = {_EXPORT, "papermill-error-cell-tag"}
    notebook.cells = [cell for cell in notebook.cells if not drop & set(cell.metadata.get("tags", []))]
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": _KERNEL}
    for number, cell in enumerate(notebook.cells):
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = cell_id("parameters", number)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _cleaned(output, root)]
    return notebook


def _cleaned(output: NotebookNode, root: Path) -> bool:
    """Clean a text output in place; False when nothing of it is left."""
    if output.output_type == "stream":
        if output.name == "stderr":
            output["text"] = _PROGRESS_BAR.sub("", output.text)
        output["text"] = _without_paths(output.text, root)
        return bool(output.text.strip())
    if output.output_type == "error":
        output["traceback"] = [_without_paths(line, root) for line in output.traceback]
    return True


def _without_paths(text: str, root: Path) -> str:
    return text.replace(f"{root}{os.sep}", "").replace(str(Path.home()), "~")


def cell_id(kind: str, number: int) -> str:
    """An id for an inserted cell that is the same in every run."""
    return hashlib.sha256(f"{kind}{number}".encode()).hexdigest()[:12]


def note(notebook: NotebookNode, kind: str, text: str) -> None:
    """Put an admonition under the page's title, in place of an earlier one; an empty text only takes it away.

    Args:
        notebook: changed in place.
        kind: ``danger`` (it failed), ``warning`` (it is out of date) or ``note``.
        text: Markdown.
    """
    notebook.cells = [cell for cell in notebook.cells if _NOTE not in cell.metadata.get("tags", [])]
    if text:
        cell = nbformat.v4.new_markdown_cell(f":::{{{kind}}}\n{text}\n:::", id=cell_id(_NOTE, 0))
        cell.metadata["tags"] = [_NOTE]
        notebook.cells.insert(1 if notebook.cells else 0, cell)


def downloads(notebook: NotebookNode, source: Notebook, records: bool) -> None:
    """Close the page with links to what made it.

    Args:
        notebook: changed in place.
        source: its entry in the index.
        records: whether it has records to offer.
    """
    links = [f"{{download}}`the notebook </notebooks/{source.name}.ipynb>`"]
    if records:
        links.append(f"{{download}}`its records <{source.records.name}>` (one JSON line a value)")
    text = f"**Behind this page:** {', '.join(links)}. Run it again with other parameters: "
    text += f'`make notebook NB={source.name} P="name=value"`.'
    notebook.cells.append(nbformat.v4.new_markdown_cell(text, id=cell_id("downloads", 0)))
