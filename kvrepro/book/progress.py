"""What the build says while it works: which notebooks run, how far they are, and how long is left."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from kvrepro.book.schedule import Round, Run, time_left

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


@dataclass
class _Running:
    """A notebook under way: where its sweeps tell their progress, since when it runs, when that was last told."""

    feed: Path
    since: float
    said: float


class Reporter:
    """One bar over the notebooks; beneath it a line for each that runs. Without a terminal, a line now and then."""

    def __init__(self, rounds: Sequence[Round], known: Mapping[str, float], stream: TextIO | None = None) -> None:
        """Nothing is drawn yet.

        Args:
            rounds: notebooks to run, in order.
            known: seconds that a notebook is expected to take, where that is known.
            stream: where to write; standard error by default.
        """
        self._stream = stream or sys.stderr
        self._rounds, self._known = list(rounds), dict(known)
        self._total = sum(len(each.runs) for each in rounds)
        self._took: dict[Run, float] = {}
        self._running: dict[Run, _Running] = {}
        self._lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory(prefix="kvrepro-progress-")
        self._lines = max((each.jobs for each in rounds), default=0)
        self._live = self._stream.isatty() and _rows(self._stream) > self._lines + 1
        self._bars: list[Any] = []  # the bar over the notebooks, then the lines beneath it

    def __enter__(self) -> Reporter:
        """Draw the bar and start watching the feeds."""
        if self._live and self._total:
            form = "{bar:20} {n_fmt}/{total_fmt} runs, {elapsed}{postfix}"
            same = {"file": self._stream, "dynamic_ncols": True}
            self._bars = [tqdm(total=self._total, bar_format=form, position=0, **same)]
            for line in range(self._lines):
                self._bars.append(tqdm(bar_format="  {desc}", position=line + 1, leave=False, **same))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bar away."""
        self._stop.set()
        self._thread.join()
        for bar in reversed(self._bars):
            bar.close()
        self._folder.cleanup()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with self._lock:
            if self._live:
                tqdm.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)

    @contextmanager
    def running(self, run: Run, why: str) -> Iterator[Path]:
        """Show that a notebook runs; several threads may, each for one of its own.

        Args:
            run: which one.
            why: why it runs.

        Yields:
            The file that its sweeps append their progress to.
        """
        with self._lock:
            number = len(self._took) + len(self._running) + 1
            feed = Path(self._folder.name) / f"{number}.jsonl"
            now = time.monotonic()
            self._running[run] = _Running(feed, since=now, said=now)
            self.say(f"[{number}/{self._total}] {run} ({why}){self._expectation(run)}")
        yield feed
        with self._lock:
            self._took[run] = time.monotonic() - self._running.pop(run).since
            if self._bars:
                self._bars[0].update(1)

    def _expectation(self, run: Run) -> str:
        parts = [f"about {duration(self._known[run.notebook])}"] if run.notebook in self._known else []
        if left := self.left():
            parts.append(f"{duration(left)} left in all")
        return f": {', '.join(parts)}" if parts else ""

    def left(self) -> float | None:
        """Seconds left for all notebooks, from what is expected and from those run so far; None while unknown."""
        with self._lock:
            samples = list(self._took.values()) or list(self._known.values())
            if not samples:
                return None
            guess, now = sum(samples) / len(samples), time.monotonic()
            left = 0.0
            for each in self._rounds:
                expected = {run: self._known.get(run.notebook, guess) for run in each.runs if run not in self._took}
                since = {run: self._running[run].since for run in expected if run in self._running}
                running = [max(0.0, expected[run] - (now - start)) for run, start in since.items()]
                waiting = [seconds for run, seconds in expected.items() if run not in since]
                left += time_left(running, waiting, each.jobs)
            return left

    def _watch(self) -> None:
        while not self._stop.wait(_TICK_S):
            self._tick()

    def _tick(self) -> None:
        with self._lock:
            doing = {run: f"{run}: {_doing(_last_step(each.feed))}" for run, each in self._running.items()}
            if self._bars:
                left = self.left()
                self._bars[0].set_postfix_str(f"about {duration(left)} left" if left is not None else "")
                for bar, text in itertools.zip_longest(self._bars[1:], doing.values(), fillvalue=""):
                    bar.set_description_str(text)
                return
            now = time.monotonic()
            for run, text in doing.items():
                if now - self._running[run].said >= _QUIET_S:
                    self._running[run].said = now
                    self.say(f"      {text}")


def _doing(step: Mapping[str, Any] | None) -> str:
    """How far a sweep is."""
    if step is None:
        return "running"
    left = f", {duration(step['left_s'])} left" if step.get("left_s") is not None else ""
    return f"{step['done']}/{step['total']} {step['running']}{left}"


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
