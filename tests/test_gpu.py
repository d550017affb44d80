"""On a machine with a GPU: what the compiler makes of the kernels, the graphs, and PyTorch's own fused attention."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; the kernels' tests run in Triton's interpreter")
@pytest.mark.parametrize("check", ["check_prefill", "check_decode"])
def test_kernels_and_graphs_on_the_gpu(check: str) -> None:
    """In a process of its own, because this one has told Triton to interpret."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{check}"],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
