"""Where and by what a value was measured: commit, date, device, versions, wall time and peak memory."""

from __future__ import annotations

import functools
import os
import platform
import re
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

#: The checkout that holds the package, or site-packages where it was installed without one.
ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "kvrepro", "datasets")


@functools.cache
def commit(root: Path = ROOT) -> tuple[str | None, bool | None]:
    """Git commit of the checkout and whether the tree differs from it.

    Looked up once a process, because a process runs the code it started with.

    Args:
        root: the folder whose own repository is meant; a repository further up does not count.

    Returns:
        (commit, dirty); (None, None) outside a checkout, (None, True) before the first commit. Where the sources are
        a copy without history (a container), KVREPRO_COMMIT names the commit; a trailing "+" says that they differ.
    """
    if named := os.environ.get("KVREPRO_COMMIT"):
        return named.removesuffix("+"), named.endswith("+")
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None, None
    head = _git(root, "rev-parse", "--verify", "HEAD")
    status = _git(root, "status", "--porcelain")
    return head, None if status is None else bool(status)


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a value may depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def cpu_name() -> str:
    """Model name of the CPU, without the trademark signs; the architecture's name where the system tells no model."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    name = match.group(1) if match else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)", "", name).strip()


def device_name(device: torch.device | str | None = None) -> str:
    """Name of a device, as records show it and as timing experiments put it into their parameters.

    Args:
        device: a torch device; None for the GPU where this process has used one, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_initialized() else "cpu"
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process in bytes: resident now, or the most that it has been."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        match = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s*(\d+) kB", text, flags=re.MULTILINE)
    except OSError:
        match = None
    if match:
        return int(match.group(1)) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """Context manager that measures wall time and peak memory of what runs inside it.

    Attributes:
        wall_s: seconds.
        peak_bytes: with a GPU in use, the most bytes its tensors held, model included
            (``torch.cuda.max_memory_allocated``); else the growth of the process's resident memory over its size at
            the start. The kernel's high-water mark is reset first where that is allowed; where it is not, growth
            below an earlier peak reads as 0.
        device: name of the device in use.
    """

    wall_s: float = 0.0
    peak_bytes: int = 0
    device: str = ""

    def __enter__(self) -> Meter:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._floor = resident_bytes() if _reset_high_water_mark() else resident_bytes(peak=True)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        on_gpu = torch.cuda.is_initialized()
        if on_gpu and error is None:
            torch.cuda.synchronize()  # after an error it could raise a second one
        self.wall_s = time.perf_counter() - self._start
        gpu_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0
        self.peak_bytes = gpu_bytes or max(0, resident_bytes(peak=True) - self._floor)
        self.device = device_name("cuda" if gpu_bytes else "cpu")


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def describe(meter: Meter, code: str, module: str) -> dict[str, Any]:
    """Provenance of one record, ready for JSON. The machine's host name is left out on purpose.

    Args:
        meter: the finished measurement.
        code: fingerprint of the code that measured.
        module: dotted name of the measuring module.
    """
    head, dirty = commit()
    return {
        "commit": head,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": meter.device,
        "threads": torch.get_num_threads(),
        "versions": dict(versions()),
        "wall_s": round(meter.wall_s, 3),
        "peak_bytes": meter.peak_bytes,
        "code": code,
        "module": module,
    }
