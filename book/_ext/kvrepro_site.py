"""Makes the built site stand alone: nothing in its pages points outside for scripts.

Jupyter Book always loads sphinx_thebe, which writes a CDN's address into every page; the pages hold finished results
and run nothing, so it is taken out. The theme asks for its icon fonts ahead of need in a way that browsers refuse, with
an error, for pages opened from disk; the icons are drawn by a script, so these lines are taken out too.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

_THEBE = "sphinx_thebe"
_FONT_PRELOAD = re.compile(r'<link rel="preload" as="font"[^>]*>\n?')


def drop_thebe(app: Sphinx, config: Config) -> None:
    """Disconnect sphinx_thebe, whose script tag names a CDN in every page even when its button is off.

    Args:
        app: the application, with every extension set up.
        config: its configuration; not used.
    """
    for event, listeners in app.events.listeners.items():
        app.events.listeners[event] = [item for item in listeners if item.handler.__module__ != _THEBE]
    app.registry.css_files = [item for item in app.registry.css_files if item[0] != "sphinx-thebe.css"]


def drop_font_preloads(app: Sphinx, error: Exception | None) -> None:
    """Take the preloading of icon fonts out of the finished pages.

    Args:
        app: the application.
        error: what stopped the build, None when it went through.
    """
    if error is None and app.builder.format == "html":
        for page in Path(app.outdir).rglob("*.html"):
            text = page.read_text(encoding="utf-8")
            if _FONT_PRELOAD.search(text):
                page.write_text(_FONT_PRELOAD.sub("", text), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.connect("config-inited", drop_thebe, priority=900)
    app.connect("build-finished", drop_font_preloads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
