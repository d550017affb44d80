"""Figures: every method has a look of its own that colour-blind readers can tell, and files are always the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from kvrepro import methods, plots

# Machado, Oliveira and Fernandes (2009), severity 1: what a reader sees, in linear RGB.
VISION = {
    "usual": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}


def lab(colour: str, vision: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of a colour as seen with a colour vision."""
    c = np.array(to_rgb(colour))
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(vision @ linear, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_every_method_has_a_style_of_its_own_and_of_its_kind() -> None:
    assert set(plots.STYLES) == set(methods.names())
    for name, style in plots.STYLES.items():
        assert style.kind == methods.describe(name).kind
    assert len({style.colour for style in plots.STYLES.values()}) == len(plots.STYLES)
    assert len({style.marker for style in plots.STYLES.values()}) == len(plots.STYLES)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("kind", ["eviction", "merging"])
def test_colours_of_a_kind_stay_apart(kind: str, vision: str) -> None:
    seen = {name: lab(s.colour, VISION[vision]) for name, s in plots.STYLES.items() if s.kind == kind}
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 15, (one, other)


def test_variants_look_like_their_method_but_paler() -> None:
    style = plots.style("weightedkv(merge=False)")
    assert style.title == "WeightedKV, values evicted"
    assert style.hollow and style.colour != plots.style("weightedkv").colour
    assert plots.style("kvmerger(sigma=5.0)").title == "KVMerger (sigma=5.0)"
    with pytest.raises(ValueError, match="there are full, streaming_llm"):
        plots.style("nothing")


def drawing() -> plt.Figure:
    """A small figure with lines of two methods."""
    figure, axes = plots.panels(2, 2)
    frame = pd.DataFrame({"label": ["h2o", "h2o", "full", "full"], "x": [1, 2, 1, 2], "y": [1.0, 2, 3, 4]})
    plots.lines(axes[0], frame.assign(e=0.1), "x", "y", "e")
    plots.heatmap(axes[1], np.arange(6.0).reshape(2, 3))
    plots.legend_below(figure, axes[0])
    return figure


def test_svg_is_the_same_every_time() -> None:
    plots.theme()
    first, second = drawing(), drawing()
    assert plots.svg(first) == plots.svg(second)
    assert b"<dc:date>" not in plots.svg(first)
    plt.close("all")


def test_large_figures_become_png_and_captions_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawing()
    text = plots.figure_html(figure, "a < b. Then more", 'quotes "inside"')
    assert "image/svg+xml;base64" in text and "a &lt; b" in text and "quotes &quot;inside&quot;" in text
    monkeypatch.setattr(plots, "SVG_LIMIT", 10)
    assert "image/png;base64" in plots.figure_html(figure, "", "")
    plt.close("all")


def test_save_figure(tmp_path: Path) -> None:
    figure = drawing()
    one = plots.save_figure(figure, tmp_path / "deep" / "a.svg").read_bytes()
    assert one == plots.svg(drawing())  # a figure drawn twice may settle its layout a little further
    first = plots.save_figure(figure, tmp_path / "a.png").read_bytes()
    assert first == plots.save_figure(figure, tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        plots.save_figure(figure, tmp_path / "a.pdf")
    plt.close("all")


def test_panels_hide_the_spare_ones() -> None:
    figure, axes = plots.panels(5, 3)
    assert len(axes) == 5 and len(figure.axes) == 6 and not figure.axes[5].axison
    plt.close("all")
