"""A miniature of the repository, for tests of the engine: two notebooks, three pages, the real configuration."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kvrepro.book import Project

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """from kvrepro.records import Cell, Store, Value


def measure() -> Value:
    return Value(float(size), spread=0.5, n=2)


cell = Cell(
    paper="demo", experiment="sizes", metric="size", method="h2o", model="none", model_sha256="0",
    data="none", data_sha256="0", budget=int(budgets[0]), params={"size": size},
)
records = Store.default().sweep([(cell, measure)], title="sizes")
print("value", records[0].value.value)"""


def write_notebook(path: Path, cells: list[tuple[str, str]]) -> None:
    """Write a notebook: pairs of a tag (``md``, ``code`` or ``parameters``) and the cell's text."""
    notebook = new_notebook()
    for number, (kind, text) in enumerate(cells):
        cell = new_markdown_cell(text) if kind == "md" else new_code_cell(text)
        cell["id"] = f"cell{number}"
        if kind == "parameters":
            cell.metadata["tags"] = ["parameters"]
        notebook.cells.append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def make_project(root: Path) -> Project:
    """Make the miniature in an empty folder."""
    write_notebook(
        root / "notebooks/demo/sizes.ipynb",
        [
            ("md", "# Sizes\n\nMeasures $x^2$."),
            ("parameters", 'budgets = [64, 128]  # slots\nsize = 3\nlabel = "a"\nratio = None'),
            ("code", MEASURE),
            ("code", "from myst_nb import glue\n\nglue('demo_size', float(size), display=False)"),
        ],
    )
    write_notebook(
        root / "notebooks/demo/words.ipynb",
        [
            ("md", "# Words"),
            ("parameters", "times = 1"),
            ("code", "import sys\n\nprint('progress 50%|##   | 1/2 [00:00<00:01, 1.0it/s]', file=sys.stderr)"),
            ("code", "from kvrepro.slots import Slots\n\nprint(Slots.__name__ * times)"),
        ],
    )
    index = [
        {"name": "demo/sizes", "title": "Sizes", "profiles": {"smoke": {"size": 2}, "quick": {}}},
        {"name": "demo/words", "title": "Words", "profiles": {"smoke": {}, "gpu": {"times": 2}}},
    ]
    (root / "notebooks/index.yml").write_text(yaml.safe_dump(index), encoding="utf-8")
    pages = ["book/results/demo/sizes", "book/results/demo/words", "book/rerun", "book/compare", "book/status"]
    toc = {"format": "jb-book", "root": "book/intro", "chapters": [{"file": page} for page in pages]}
    (root / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")
    shutil.copy(ROOT / "_config.yml", root)
    for folder in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / folder, root / "book" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "book/references.bib").write_text("", encoding="utf-8")
    glued = "{glue:text}`results/demo/sizes.ipynb::demo_size:.1f`"
    (root / "book/intro.md").write_text(f"# Demo\n\n$a^2 + b^2$ is {glued}.\n", encoding="utf-8")
    (root / "book/rerun.md").write_text("# Rerun\n\n```{include} _generated/notebooks.md\n```\n", encoding="utf-8")
    return Project(root.resolve())
