"""Fixtures shared by all tests: one thread, records in the test's own folder, the embedded model once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Kernels run in Triton's interpreter, which needs no GPU; it must be told before torch imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

_PRIVATE = ("KVREPRO_DATA_DIR", "KVREPRO_EXECUTOR", "KVREPRO_PROGRESS", "KVREPRO_STRICT", "KVREPRO_TIMES")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors run faster on one thread, and other jobs share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the user's data or writes among the user's records."""
    monkeypatch.setenv("KVREPRO_RESULTS", str(tmp_path / "results"))
    for variable in _PRIVATE:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def embedded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, prepared, in float32 on the CPU, and its tokenizer; treat it as read-only."""
    from kvrepro.models import load_model

    model, tokenizer = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
    assert tokenizer is not None
    return model, tokenizer
