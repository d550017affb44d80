"""The figure of the deciding chapter: divergence against bytes against time, from records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvrepro import plots
from kvrepro.decide import FIDELITY, percent
from kvrepro.experiments.across import pareto_front
from kvrepro.ledger import select
from kvrepro.records import Record
from kvrepro.rules import label, over_seeds

#: Ours, as on the page of the numbers: shares of divergence, bytes and time within which two methods count as equal.
SLACK = (0.01, 0.0, 0.05)
_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 5, 8, 12, 20, 40)


@dataclass(frozen=True)
class Drawn:
    """A figure with what a reader must know of it.

    Attributes:
        figure: the figure.
        caption: reads without the page.
        alt: for those who cannot see it.
        records: the records drawn.
    """

    figure: Figure
    caption: str
    alt: str
    records: tuple[Record, ...]


def draw(records: Iterable[Record], model: str) -> Drawn | None:
    """Divergence against reading time, one panel a share of the bytes; None without records of both.

    Args:
        records: one a cell.
        model: whose records.
    """
    own = over_seeds([record for record in records if record.cell.model == model])
    times = {label(r): r for r in select(own, {"paper": "across", "experiment": "reading_times"})}
    held = [r for r in select(own, FIDELITY.where) if label(r) in times]
    if not held:
        return None
    text = max({r.cell.data for r in held}, key=lambda name: sum(r.cell.data == name for r in held))
    held = [r for r in held if r.cell.data == text]
    points = _points(held, times)
    shares = sorted(points.share.unique(), reverse=True)
    plots.theme()
    figure, panels = plt.subplots(
        1, len(shares), figsize=(max(4.6, 2.4 * len(shares)), 4.8), layout="constrained", sharey=True, squeeze=False
    )
    for axes, share in zip(panels[0], shares, strict=True):
        _panel(axes, points[points.share == share])
        _time_axis(axes, points.time)
        axes.set_title(f"{100 * share:g} % of the bytes", fontsize=9)
    panels[0][0].set_ylabel("KL(full || compressed), nats/token")
    figure.supxlabel("time to read the context and compress it, times the full cache's", fontsize=9)
    _legend(figure, panels[0])
    used = (*held, *(times[name] for name in points.label.unique()))
    return Drawn(figure, _caption(model, text, held, used), _alt(points, shares), used)


def _points(held: Sequence[Record], times: dict[str, Record]) -> pd.DataFrame:
    """One row a method and share, with what is on the front of all three costs."""
    points = pd.DataFrame(
        {
            "label": [label(r) for r in held],
            "share": [r.cell.params["share"] for r in held],
            "kl": [r.value.value for r in held],
            "kl_error": [r.value.spread for r in held],
            "time": [times[label(r)].value.value for r in held],
            "time_error": [times[label(r)].value.spread for r in held],
        }
    ).astype({"kl_error": float, "time_error": float})
    points["front"] = pareto_front(points[["kl", "share", "time"]].to_numpy(dtype=float), SLACK)
    return points


def _panel(axes: Axes, part: pd.DataFrame) -> None:
    """The methods at one share, rings around those on the front, and the best divergence by time."""
    edge = part.sort_values("time")
    axes.step(edge.time, np.minimum.accumulate(edge.kl), where="post", color="0.45", lw=1, zorder=1)
    names = list(plots.STYLES)
    for _, row in part.sort_values("label", key=lambda x: x.map(lambda n: names.index(n.partition("(")[0]))).iterrows():
        look = plots.style(row.label).line() | {"linestyle": "none"}
        errors = np.nan_to_num([row.kl_error, row.time_error])
        axes.errorbar(row.time, row.kl, errors[0], errors[1], elinewidth=0.8, zorder=3, **look)
        if row.front:
            axes.plot(row.time, row.kl, "o", ms=13, mfc="none", mec="black", mew=1.1, zorder=2)


def _time_axis(axes: Axes, time: pd.Series) -> None:
    """Logarithmic axes with ticks that can be read."""
    axes.set(xscale="log", yscale="log")
    low, high = time.min(), time.max()
    ticks = [t for t in _TICKS if low / 1.1 <= t <= high * 1.1] or [1]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlim(low / 1.15, high * 1.15)
    axes.xaxis.minorticks_off()


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend above the figure, with every method of any panel once."""
    entries = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=min(5, len(entries)))


def _caption(model: str, text: str, held: Sequence[Record], used: Sequence[Record]) -> str:
    one, clock = held[0], used[-1]
    params, timing = one.cell.params, clock.cell.params
    return (
        f"Quality, bytes and time: the divergence of the predictions from the full cache's (lower is better) against "
        f"the time to read a context and compress it, relative to the full cache (left is better), one panel a share "
        f"of the full cache's bytes (right is better). Ringed: on the Pareto front of all three, no other point of any "
        f"panel is at least as good in each and better in one (divergences within {percent(SLACK[0])} and times within "
        f"{percent(SLACK[2])} count as equal). Grey steps: the best divergence at that time or less. Filled markers: "
        f"methods as published; hollow: variants. Bars: one standard error. {model}, {text}, {params['context']:,} "
        f"tokens of context, {params['continuation']} predicted, n = {one.value.n} passages; timed on "
        f"{clock.provenance.get('device')}, {timing['passages']} x {timing['context']:,} tokens at one budget, whose "
        f"time stands in all panels."
    )


def _alt(points: pd.DataFrame, shares: Sequence[float]) -> str:
    """What the figure shows, in a sentence: the lowest divergence of each panel, and its time."""
    lowest = [points[points.share == s].sort_values("kl").iloc[0] for s in shares]
    told = [
        f"{100 * row.share:g} % of the bytes: {plots.style(row.label).title}, {row.kl:.3g} nats per token at "
        f"{row.time:.2f} times the full cache's reading time"
        for row in lowest
    ]
    return f"KL divergence against reading time, one panel a share of bytes. The lowest points: {'; '.join(told)}"
