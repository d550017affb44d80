"""How many cells an hour one GPU measures, and all of this machine's, by the workers of a Dask cluster.

Run from the repository's root: ``python -m benchmarks.many_gpus``, with the numbers of workers to compare if not 1 and
all (``python -m benchmarks.many_gpus 1 2 4``). Workers are started on this machine, one a GPU, and measure the same
cells each time, into stores that are thrown away. Before anything is timed one worker measures them all once: kernels
are compiled for sizes that a cell has, and are kept on disk. Then every worker loads the model and the text.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from kvrepro import executors
from kvrepro.book.workers import working
from kvrepro.experiments import across
from kvrepro.records import Record

METHODS = ["streaming_llm", "h2o", "tova", "snapkv", "cam", "weightedkv", "kvmerger", "kvslimmer"]
SHARES = [0.75, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.125]


@click.command()
@click.argument("counts", nargs=-1, type=click.IntRange(1))
@click.option("--device", default="cuda", show_default=True, help="cpu tries it out without a GPU")
@click.option("--passages", default=32, show_default=True, help="passages of 1,024 + 256 tokens a cell")
@click.option("--cells", default=len(METHODS) * len(SHARES), show_default=True, help="cells to measure each time")
def main(counts: Sequence[int], device: str, passages: int, cells: int) -> None:
    """Print, for each number of workers, the cells an hour and how many times those of the first number they are."""
    gpus = torch.cuda.device_count()
    if device == "cuda" and max(counts, default=2) > gpus:
        sys.exit(f"a worker needs a GPU of its own, and this machine has {gpus}")
    hourly(1, device, passages, cells)
    first = None
    for count in counts or (1, max(2, gpus)):
        rate = hourly(count, device, passages, cells)
        first = first or rate
        print(f"{count} workers: {rate:.0f} cells an hour, {rate / first:.2f} times", flush=True)


def hourly(count: int, device: str, passages: int, cells: int) -> float:
    """Cells an hour with so many workers."""
    with working(count, Path.cwd()) as name:
        os.environ[executors.VARIABLE] = name
        swept(METHODS[:1], [0.9 - 0.01 * i for i in range(4 * count)], device, passages)
        start = time.perf_counter()
        found = swept(METHODS, SHARES[: -(-cells // len(METHODS))], device, passages)
        return len(found) / (time.perf_counter() - start) * 3600


def swept(methods: list[str], shares: list[float], device: str, passages: int) -> list[Record]:
    """Records of fidelity at the same bytes, measured anew."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KVREPRO_RESULTS"] = folder
        found = across.same_bytes(
            "essays", methods, shares, 1024, 256, passages, model="smollm2-135m", dtype="float32", device=device
        )
    if wrong := [r for r in found if r.status != "ok"]:
        sys.exit(f"{len(wrong)} cells have no value, the first because of: {wrong[0].reason}")
    return found


if __name__ == "__main__":
    main()
