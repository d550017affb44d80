"""What the build says while it works: which notebook runs, how far it is, and how long is left."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

_TICK_S = 0.5
_QUIET_S = 30.0  # without a terminal, a line of progress this often


def duration(seconds: float) -> str:
    """Seconds as ``8 s``, ``3 min 20 s`` or ``1 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Reporter:
    """One bar over the notebooks; beneath it the sweep that runs. Without a terminal, a line now and then.

    Attributes:
        feed: file that sweeps append their progress to.
    """

    def __init__(self, names: Sequence[str], known: Mapping[str, float], stream: TextIO | None = None) -> None:
        """Nothing is drawn yet.

        Args:
            names: notebooks to run, in order.
            known: seconds that a notebook is expected to take, where that is known.
            stream: where to write; standard error by default.
        """
        self._stream = stream or sys.stderr
        self._names, self._known = list(names), dict(known)
        self._took: list[float] = []
        self._running, self._since, self._said = "", 0.0, 0.0
        self._folder = tempfile.TemporaryDirectory(prefix="kvrepro-progress-")
        self.feed = Path(self._folder.name) / "progress.jsonl"
        self._live = self._stream.isatty() and _rows(self._stream) > 2
        self._bar = self._detail = None

    def __enter__(self) -> Reporter:
        """Draw the bar and start watching the feed."""
        if self._live and self._names:
            form = "{desc} {bar:20} {n_fmt}/{total_fmt} notebooks, {elapsed}{postfix}"
            self._bar = tqdm(total=len(self._names), file=self._stream, bar_format=form, position=0, dynamic_ncols=True)
            self._detail = tqdm(file=self._stream, bar_format="  {desc}", position=1, leave=False, dynamic_ncols=True)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bar away."""
        self._stop.set()
        self._thread.join()
        for bar in (self._detail, self._bar):
            if bar is not None:
                bar.close()
        self._folder.cleanup()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._live:
            tqdm.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def running(self, name: str, why: str) -> Iterator[None]:
        """Show that a notebook runs, and what came of it.

        Args:
            name: the notebook.
            why: why it runs.
        """
        self.feed.write_text("", encoding="utf-8")
        self._running, self._since = name, time.monotonic()
        self._said = self._since
        number = len(self._took) + 1
        self.say(f"[{number}/{len(self._names)}] {name} ({why}){self._expectation(name)}")
        yield
        self._took.append(time.monotonic() - self._since)
        self._running = ""
        if self._bar is not None:
            self._bar.update(1)

    def _expectation(self, name: str) -> str:
        parts = [f"about {duration(self._known[name])}"] if name in self._known else []
        if left := self.left():
            parts.append(f"{duration(left)} left in all")
        return f": {', '.join(parts)}" if parts else ""

    def left(self) -> float | None:
        """Seconds left for all notebooks, from what is expected and from those run so far; None while unknown."""
        waiting = self._names[len(self._took) :]
        samples = self._took or list(self._known.values())
        if not samples:
            return None
        guess = sum(samples) / len(samples)
        total = sum(self._known.get(name, guess) for name in waiting)
        return max(0.0, total - (time.monotonic() - self._since if self._running else 0.0))

    def _watch(self) -> None:
        while not self._stop.wait(_TICK_S):
            if self._running:
                self._tick(_last_step(self.feed))

    def _tick(self, step: Mapping[str, Any] | None) -> None:
        left = self.left()
        doing = f"{step['done']}/{step['total']} {step['running']}" if step else "running"
        if step and step.get("left_s") is not None:
            doing += f", {duration(step['left_s'])} left"
        if self._bar is not None and self._detail is not None:
            self._bar.set_description_str(self._running, refresh=False)
            self._bar.set_postfix_str(f"about {duration(left)} left" if left is not None else "", refresh=False)
            self._bar.refresh()
            self._detail.set_description_str(doing)
        elif time.monotonic() - self._said >= _QUIET_S:
            self._said = time.monotonic()
            self.say(f"      {self._running}: {doing}")


def _rows(stream: TextIO) -> int:
    """Rows of a terminal: one without any, as some programs make them, can show no bar. Unknown counts as enough."""
    try:
        return os.get_terminal_size(stream.fileno()).lines
    except OSError:
        return 24


def _last_step(feed: Path) -> Mapping[str, Any] | None:
    """The last whole line of the feed; None before the first."""
    try:
        lines = feed.read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None
