"""Figures: one fixed look for every method, one theme, captions that stand alone, and where each number came from.

A method keeps its colour and marker on every page; its line style says what kind it is (solid: merges, dashed: evicts,
dotted: keeps everything). The colours are Okabe and Ito's and Paul Tol's, so that methods of a kind stay apart for
readers with any of the common colour-vision deficiencies.
"""

from __future__ import annotations

import html
import io
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML, Markdown, display
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from kvrepro.records import Record

LINES = {"baseline": ":", "eviction": "--", "merging": "-"}
SVG_LIMIT = 1_000_000  # bytes: above this a figure is shown as PNG


@dataclass(frozen=True)
class Style:
    """How a method looks.

    Attributes:
        title: Its name in legends.
        colour: Hexadecimal colour.
        marker: Matplotlib marker.
        kind: baseline, eviction or merging, as in the registry.
        hollow: Whether markers are drawn empty (variants of a method).
    """

    title: str
    colour: str
    marker: str
    kind: str
    hollow: bool = False

    @property
    def linestyle(self) -> str:
        """Line style of the kind; variants are dash-dotted."""
        return "-." if self.hollow else LINES[self.kind]

    def line(self) -> dict[str, object]:
        """Keyword arguments for ``Axes.plot`` and ``Axes.errorbar``."""
        face = "white" if self.hollow else self.colour
        return {
            "color": self.colour,
            "linestyle": self.linestyle,
            "marker": self.marker,
            "markerfacecolor": face,
            "label": self.title,
        }


STYLES = {
    "full": Style("Full cache", "#000000", ".", "baseline"),
    "streaming_llm": Style("StreamingLLM", "#999933", "v", "eviction"),
    "h2o": Style("H2O", "#F0A000", "s", "eviction"),
    "tova": Style("TOVA", "#56B4E9", "^", "eviction"),
    "snapkv": Style("SnapKV", "#332288", "D", "eviction"),
    "pyramidkv": Style("PyramidKV", "#117733", "p", "eviction"),
    "keydiff": Style("KeyDiff", "#A50F15", "<", "eviction"),
    "random": Style("Random eviction", "#888888", "x", "eviction"),
    "cam": Style("CaM", "#CC79A7", ">", "merging"),
    "d2o": Style("D2O", "#882255", "h", "merging"),
    "keepkv": Style("KeepKV", "#5933CC", "d", "merging"),
    "asymkv": Style("AsymKV", "#7CA653", "P", "merging"),
    "weightedkv": Style("WeightedKV", "#0072B2", "o", "merging"),
    "kvmerger": Style("KVMerger", "#D55E00", "*", "merging"),
    "kvslimmer": Style("KVSlimmer", "#009E73", "X", "merging"),
    "attention_matching": Style("Attention Matching", "#003366", "H", "merging"),
}
VARIANTS = {
    "weightedkv(merge=False)": "WeightedKV, values evicted",
    "kvmerger(mass='attention')": "KVMerger, mass in the logits",
    "kvmerger(weights='mean')": "KVMerger, plain means",
    "kvmerger(pivot='random')": "KVMerger, random pivot",
    "kvmerger(budget_mode='threshold')": "KVMerger, fixed threshold",
    "asymkv(fisher='forward')": "AsymKV, forward only",
    "attention_matching(heads='same')": "Attention Matching, equal heads",
    "attention_matching(ridge=1000000, rounds=0)": "Attention Matching, not fitted",
    "kvslimmer(variant='released')": "KVSlimmer, released code",
    "asymkv(variant='released')": "AsymKV, released code",
}


def style(label: str) -> Style:
    """The look of a method, or of a variant ``name(option=value)``: the method's, paler and with hollow markers.

    Raises:
        ValueError: The label names no method.
    """
    name, _, options = label.partition("(")
    if name not in STYLES:
        raise ValueError(f"no style for {label!r}; there are {', '.join(STYLES)}")
    base = STYLES[name]
    if not options:
        return base
    title = VARIANTS.get(label, f"{base.title} ({options.rstrip(')')})")
    kind = "eviction" if "merge=False" in options else base.kind  # what WeightedKV is without its merge
    return replace(base, title=title, colour=paler(base.colour, 0.35), kind=kind, hollow=True)


def paler(colour: str, share: float) -> str:
    """A colour mixed with ``share`` (0 to 1) of white."""
    return to_hex((1 - share) * np.array(to_rgb(colour)) + share)


def theme() -> None:
    """Set the look of all figures. The ground is white in dark mode too, so that every colour keeps its contrast."""
    look = {
        "svg.hashsalt": "kvrepro",  # otherwise the SVG's identifiers differ from run to run
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "figure.dpi": 100,
        "savefig.bbox": "tight",
        "axes.edgecolor": "0.3",
        "axes.titlesize": "medium",
        "legend.frameon": False,
        "legend.handlelength": 3.2,
        "lines.markersize": 6,
        "lines.linewidth": 1.6,
    }
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.85, rc=look)


def panels(n: int, columns: int, width: float = 9.0, aspect: float = 0.75) -> tuple[Figure, list[Axes]]:
    """Small multiples sharing both axes.

    Args:
        n: Number of panels.
        columns: Panels a row, at most.
        width: Width of the figure, inches; less where few panels would become larger than 4.6 inches.
        aspect: Height of a panel over its width.

    Returns:
        The figure and its ``n`` axes, row by row.
    """
    columns = min(columns, n)
    rows = -(-n // columns)
    width = min(width, 4.6 * columns)
    size = (width, width / columns * aspect * rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    for spare in axes[n:]:
        spare.set_axis_off()
    return figure, axes[:n]


def lines(axes: Axes, frame: pd.DataFrame, x: str, y: str, error: str | None = None, by: str = "label") -> None:
    """One line a method.

    Args:
        axes: Where to draw.
        frame: One row a point.
        x: Column of the horizontal axis.
        y: Column of the vertical axis.
        error: Column of the standard errors, drawn as bars, or None.
        by: Column of the method's label; methods are drawn in the order of :data:`STYLES`.
    """
    order = sorted(frame[by].unique(), key=lambda label: (list(STYLES).index(label.partition("(")[0]), label))
    for label in order:
        points = frame[frame[by] == label].sort_values(x)
        bars = points[error] if error else None
        axes.errorbar(points[x], points[y], yerr=bars, capsize=2, elinewidth=0.9, **style(label).line())


def heatmap(
    axes: Axes, matrix: np.ndarray, colours: str = "viridis", limits: tuple[float, float] | None = None
) -> QuadMesh:
    """A matrix ``[rows, columns]`` as colours, first row on top; returns what ``Figure.colorbar`` needs."""
    low, high = limits if limits else (None, None)
    mesh = axes.pcolormesh(matrix, cmap=colours, vmin=low, vmax=high, rasterized=matrix.size > 4000)
    axes.set_ylim(matrix.shape[0], 0)
    axes.grid(False)
    return mesh


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend for the whole figure, with the entries of ``axes``: below it, or above where a label is."""
    handles, labels = axes.get_legend_handles_labels()
    place = "outside upper center" if figure.get_supxlabel() else "outside lower center"
    figure.legend(handles, labels, loc=place, ncols=columns)


def svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes every time for the same drawing."""
    with mpl.rc_context({"svg.hashsalt": "kvrepro"}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure to ``path`` (``.svg`` or ``.png``), the same bytes every time; returns the path.

    Raises:
        ValueError: Another suffix.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"figures are saved as .svg or .png, not {path.suffix!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_bytes(svg(figure))
    else:
        figure.savefig(path, dpi=200, metadata={"Software": None}, bbox_inches="tight")
    return path


def figure_html(figure: Figure, caption: str, alt: str) -> str:
    """An HTML figure: the drawing as an image inside the page (SVG, or PNG where that is large), and its caption."""
    data, kind = svg(figure), "svg+xml"
    if len(data) > SVG_LIMIT:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None}, bbox_inches="tight")
        data, kind = buffer.getvalue(), "png"
    source = f"data:image/{kind};base64,{b64encode(data).decode()}"
    image = f'<img src="{source}" alt="{html.escape(alt)}" style="max-width: 100%; background: white;">'
    text = f'<figcaption style="text-align: left;">{html.escape(caption)}</figcaption>'
    return f'<figure style="margin: 1rem 0;">{image}{text}</figure>'


def show(figure: Figure, caption: str, alt: str | None = None) -> None:
    """Show a figure with its caption in a notebook, and close it.

    Args:
        figure: The figure.
        caption: What is drawn, its units, the model, the text and n: it must be understood without the page.
        alt: What a reader who cannot see it should hear; the caption's first sentence where None.
    """
    display(HTML(figure_html(figure, caption, alt or caption.split(". ")[0])))
    plt.close(figure)


def say(text: str) -> None:
    """Show Markdown made from measured numbers."""
    display(Markdown(text))


def table(frame: pd.DataFrame, caption: str, digits: int = 4) -> None:
    """Show a data frame as a table with a caption; floats with ``digits`` significant digits.

    An index without a name is not shown.
    """
    named = any(name is not None for name in frame.index.names)
    body = frame.to_html(index=named, border=0, float_format=lambda x: f"{x:.{digits}g}", na_rep="–", classes="table")
    # The caption stands outside of what scrolls, so that it can be read beside a table wider than the page.
    said = f"<figcaption>{html.escape(caption)}</figcaption>"
    display(HTML(f'<figure class="data">{said}<div style="overflow-x: auto;">{body}</div></figure>'))


def mixture_boxes(axes: Axes, mixture: np.ndarray, left: float, keys: Sequence[int], colours: Sequence[str]) -> None:
    """Slots drawn as boxes filled by the tokens mixed in their values, with the token of the key written below.

    Args:
        axes: Where to draw; boxes are one unit wide and from 0 to 1 high.
        mixture: ``[slots, tokens]``, shares that sum to 1 in each row.
        left: Where the first box starts.
        keys: Token (counted from 1) whose key each slot holds, ``[slots]``.
        colours: One for each token.
    """
    for slot, (shares, key) in enumerate(zip(mixture, keys, strict=True)):
        x, bottom = left + slot, 0.0
        for token in np.flatnonzero(shares > 1e-9):
            height = float(shares[token])
            axes.bar(x + 0.45, height, 0.8, bottom, color=colours[token], edgecolor="0.2", linewidth=0.6)
            name = f"$v_{token + 1}$" if height > 0.999 else f"{height:.2f} $v_{token + 1}$"
            axes.text(
                x + 0.45, bottom + height / 2, name, ha="center", va="center", fontsize=7.5 if height > 0.1 else 6
            )
            bottom += height
        axes.text(x + 0.45, -0.06, f"$k_{key}$", ha="center", va="top", fontsize=8)


def _parameters(record: Record) -> str:
    """A record's parameters in one line, without the label that stands in a column of its own."""
    shown = {name: value for name, value in record.cell.params.items() if name != "label" and value is not None}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def provenance(records: Iterable[Record]) -> None:
    """Show, folded, where a page's numbers come from: a row a record with its key, value, date, commit and machine.

    Its title says how many were made by other code than is here now, where any were.
    """
    rows, stale = [], 0
    for record in records:
        run, value = record.provenance, record.value
        stale += not record.is_current
        shown = "in the figure" if value.value is None else f"{value.value:.4g}"
        spread = "" if value.spread is None else f" ± {value.spread:.2g}"
        commit = (run.get("commit") or "none")[:10] + (" + changes" if run.get("dirty") else "")
        rows.append(
            {
                "record": record.key[:12],
                "measured": record.cell.metric,
                "method": record.cell.params.get("label", record.cell.method),
                "budget": "" if record.cell.budget is None else f"{record.cell.budget:g}",
                "parameters": _parameters(record),
                "text": record.cell.data,
                "value": shown + spread if record.status == "ok" else f"{record.status}: {record.reason}",
                "date": str(run.get("date", ""))[:16].replace("T", " "),
                "commit": commit,
                "machine": run.get("device", ""),
                "seconds": f"{run.get('wall_s', 0):.1f}",
            }
        )
    body = pd.DataFrame(rows).to_html(index=False, border=0, classes="table")
    title = f"Where the numbers on this page come from ({len(rows)} record{'s' * (len(rows) != 1)})"
    if stale:
        title += f"; {stale} of {len(rows)} were made by other code than this version's"
    folded = f'<summary>{title}</summary><div style="overflow-x: auto;">{body}</div>'
    display(HTML(f'<details class="kv-provenance">{folded}</details>'))
