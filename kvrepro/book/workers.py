"""Workers for as long as notebooks run: processes on this machine that measure cells side by side, also on one GPU.

They are a Dask cluster of this process's own, reached over the loopback address alone. Its scheduler lives here; the
workers are programs of their own, because Dask sets variables in the environment of whoever starts them, for good.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvrepro import executors
from kvrepro.book.project import RequestError
from kvrepro.executors import ExecutorError

if TYPE_CHECKING:
    from distributed import LocalCluster

_HOST = "127.0.0.1"
_START_S = 120
_END_S = 30
_POLL_S = 0.05


def check(count: int) -> None:
    """Make sure that so many workers can be asked for, before anything runs.

    Raises:
        RequestError: fewer than one, or ``KVREPRO_EXECUTOR`` says who else measures.
        ExecutorError: Dask is not installed.
    """
    if count < 1:
        raise RequestError(f"{count} workers measure nothing: ask for 1 or more, or for none at all")
    other = os.environ.get(executors.VARIABLE, "")
    if other not in ("", executors.LOCAL):
        raise RequestError(
            f"{executors.VARIABLE} is {other!r}, and {count} workers are asked for: leave one of them out"
        )
    if find_spec("distributed") is None:
        raise ExecutorError(
            "workers: Dask is not installed here (no module named 'distributed'): pip install 'kvrepro[dask]', or "
            "measure without them"
        )


@contextmanager
def working(count: int, folder: Path, log: Path | None = None) -> Iterator[str]:
    """So many workers, each measuring one cell at a time; they have ended when the block has.

    They share the cores. Where there are several GPUs each worker sees one of them, in turns.

    Args:
        count: workers.
        folder: the working folder of their cells, as it is the kernels'.
        log: file for what they print; nowhere by default.

    Yields:
        The executor's name, for ``KVREPRO_EXECUTOR``.

    Raises:
        ExecutorError: they did not start; after an error or an interrupt inside they are killed at what they do.
    """
    from distributed import LocalCluster

    how = {"n_workers": 0, "threads_per_worker": 1, "processes": True, "host": _HOST, "silence_logs": logging.CRITICAL}
    options = {"dashboard": False, "dashboard_address": f"{_HOST}:0"}
    with (
        tempfile.TemporaryDirectory(prefix="kvrepro-workers-", ignore_cleanup_errors=True) as scratch,
        LocalCluster(**how, scheduler_kwargs=options) as cluster,
    ):
        running: list[subprocess.Popen[bytes]] = []
        try:
            with (log or Path(os.devnull)).open("wb") as output:
                for environment in _environments(count):
                    command = _command(cluster.scheduler_address, scratch)
                    running.append(_started(command, folder, environment, output.fileno()))
            _wait_for(cluster, running, log)
            yield cluster.scheduler_address.replace("tcp://", "dask://")
        except BaseException:
            for process in running:
                _kill(process)
            raise
        finally:
            _end(running)


def _environments(count: int) -> Iterator[dict[str, str]]:
    """What each worker's environment has beside this process's."""
    gpus = _gpus()
    threads = str(max(1, torch.get_num_threads() // count))
    package = str(Path(__file__).resolve().parents[2])
    for number in range(count):
        yield {
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
            # Dask would set all three to 1, and torch takes the one of MKL where it has MKL.
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),  # as for kernels
            **({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if len(gpus) > 1 else {}),
        }


def _gpus() -> list[str]:
    """The GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    found = torch.cuda.device_count()
    return named[:found] or [str(number) for number in range(found)]


def _command(address: str, scratch: str) -> list[str]:
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--memory-limit", "0"]
    command += ["--host", _HOST, "--no-dashboard", "--dashboard-address", f"{_HOST}:0", "--local-directory", scratch]
    command += ["--death-timeout", str(_START_S)]  # where this process is gone, they do not look for it for ever
    return command + (["--resources", "GPU=1"] if torch.cuda.is_available() else [])


def _started(command: list[str], folder: Path, environment: Mapping[str, str], output: int) -> subprocess.Popen[bytes]:
    """A worker, which Ctrl-C does not reach: it ends when this process says so."""
    environment = {**os.environ, **environment}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


def _wait_for(cluster: LocalCluster, running: list[subprocess.Popen[bytes]], log: Path | None) -> None:
    """Wait until all are there.

    Raises:
        ExecutorError: one ended, or it takes too long.
    """
    until = time.monotonic() + _START_S
    while len(cluster.scheduler.workers) < len(running):
        if time.monotonic() > until or any(process.poll() is not None for process in running):
            here, more = len(cluster.scheduler.workers), f"; {log} says more" if log else ""
            raise ExecutorError(f"{here} of {len(running)} workers started{more}")
        time.sleep(_POLL_S)


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    """End workers, each with the process that watches over it: whoever times something next is alone."""
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and the process that watches over it, which is the first of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
