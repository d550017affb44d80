"""Compile a script's kernel launches for a GPU that is not here: `python tests/compile_kernels.py SCRIPT`.

The interpreter runs kernels without looking at types; the compiler does. Launches are turned into compilations for
compute capability 9.0 (Triton brings all it needs); outputs stay as they were allocated.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
}
compiled: list[str] = []


def signature_of(value: Any) -> str:
    """Triton's name of an argument's type."""
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "i1"
    return "i32" if isinstance(value, int) else "fp32"


def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """What a launch does here: compile with the arguments' types."""
    names = [p.name for p in self.params]
    constants = {p.name for p in self.params if p.is_constexpr}
    given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    signature = {n: "constexpr" if n in constants else signature_of(given[n]) for n in names}
    constexprs = {n: given[n] for n in names if n in constants}
    source = ASTSource(self, signature, constexprs)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    shared = kernel.metadata.shared
    assert shared <= 232448, f"{self.__name__}: {shared} bytes of shared memory, a GPU of this kind has 232448"
    compiled.append(self.__name__)


if __name__ == "__main__":
    JITFunction.run = compile_instead
    runpy.run_path(sys.argv[1], run_name="__main__")
    print(f"compiled {len(compiled)} launches of {sorted(set(compiled))}")
