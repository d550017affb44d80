"""Fixtures shared by all tests: one thread, records in the test's folder, Triton's interpreter, one embedded model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Kernels run in Triton's interpreter, which needs no GPU; it must be told before torch imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from packaging.version import Version  # noqa: E402
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


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A process that was started in the background may ignore interrupts: this one heeds them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def mended_interpreter() -> Iterator[None]:
    """Triton's interpreter with what its later versions mended; kernels that are compiled never meet these errors."""
    triton = pytest.importorskip("triton")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    version = Version(triton.__version__)
    with pytest.MonkeyPatch.context() as patch:
        if version < Version("3.3"):
            # NumPy makes sums, scans and places of int32 int64. Triton 3.2 calls them int32 and leaves them 64 bits
            # wide, so that storing them overwrites the number behind as well: triton-lang/triton#6281. Mended by #5447
            # in ReduceScanOpInterface.to_tensor, as it is spelt since.
            misspelt = interpreter.ReduceScanOpIneterface
            to_tensor = misspelt.to_tensor

            def narrowed(self: Any, ret: Any, dtype: Any) -> Any:
                return to_tensor(self, np.asarray(ret).astype(interpreter._get_np_dtype(dtype)), dtype)

            patch.setattr(misspelt, "to_tensor", narrowed)
        if version < Version("3.4"):
            # A constant truth value has no type: triton-lang/triton#6200, mended by #6058.
            patch.setattr(interpreter.InterpreterBuilder, "get_int1_ty", lambda _: interpreter.tl.int1, raising=False)
        if version >= Version("3.9"):
            # A comparison keeps the name of the type compared, and so a number's becomes a tile of int32. Triton 3.9 is
            # the first version that refuses it as a mask.
            splat = interpreter.InterpreterBuilder.create_splat

            def splat_truth(self: Any, shape: Any, arg: Any) -> Any:
                truth = arg.data.dtype == np.bool_
                return splat(self, shape, interpreter.TensorHandle(arg.data, interpreter.tl.int1) if truth else arg)

            patch.setattr(interpreter.InterpreterBuilder, "create_splat", splat_truth)
        yield


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter holds bfloat16 as its bits, and multiplies the bits; here it multiplies the numbers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def widen(handle: Any) -> Any:
        """The numbers in float32."""
        if handle.dtype.scalar.name != "bf16":
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest),
    )


@pytest.fixture(scope="session")
def embedded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model, prepared, in float32 on the CPU, and its tokenizer; treat it as read-only."""
    from kvrepro.models import load_model

    model, tokenizer = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
    assert tokenizer is not None
    return model, tokenizer
