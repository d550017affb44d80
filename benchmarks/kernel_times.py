"""Each kernel alone beside its peers, at the shape of one Llama-3.1-8B layer: `python -m benchmarks.kernel_times`.

Medians of CUDA-event times on random data. `--sweep` tries other tiles, for a new card.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from kvrepro.attention import View
from kvrepro.kernels import pairs, prefill
from kvrepro.methods.pairs import Choice
from kvrepro.slots import partition

HEADS, KV_HEADS, DIM = 32, 8, 128


def timed(function: Callable[[], object]) -> float:
    """Median milliseconds of a call."""
    return do_bench(function, warmup=20, rep=60, return_mode="median")


def line(name: str, function: Callable[[], object], flops: float) -> None:
    """Print a time and the rate it stands for."""
    try:
        ms = timed(function)
        print(f"  {name:34s} {ms:8.3f} ms  {flops / ms / 1e9:6.0f} TFLOP/s", flush=True)
    except Exception as error:
        print(f"  {name:34s} {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)


def tensors(length: int, past: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries `[1, H_q, n, d]`, keys and values `[1, H_kv, past + n, d]`, laid out as transformers has them."""
    shapes = ((length, HEADS), (past + length, KV_HEADS), (past + length, KV_HEADS))
    return tuple(torch.randn(1, n, h, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n, h in shapes)


def fused(q: Tensor, k: Tensor, v: Tensor, name: str, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp from one of PyTorch's fused kernels."""
    if name == "cudnn":
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def prefill_kernels(length: int, past: int, sweep: bool) -> None:
    """Attention and column sums of `length` queries over `past` slots and themselves."""
    q, k, v = tensors(length, past)
    scale = DIM**-0.5
    product = 2 * HEADS * length * (past + length / 2) * DIM  # one product of queries and keys
    print(f"{length} queries over {past} slots and themselves")
    if past == 0:
        line("SDPA", lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 2 * product)
        line("cuDNN with log-sum-exp", lambda: fused(q, k, v, "cudnn"), 2 * product)
    line("flash with log-sum-exp", lambda: fused(q, k, v, "flash"), 2 * product)
    line("attend", lambda: prefill.attend(q, k, v, None, scale, None), 2 * product)
    bias = torch.rand(1, KV_HEADS, past + length, device="cuda")
    line("attend with bias", lambda: prefill.attend(q, k, v, bias, scale, None), 2 * product)
    _, lse = prefill.attend(q, k, v, None, scale, None)
    line("column_sums", lambda: prefill.column_sums(q, k, lse, None, scale, None), product)
    line("column_sums, last query", lambda: prefill.column_sums(q, k, lse, None, scale, None, length - 1), 0)
    if sweep:
        sweep_tiles(q, k, v, lse, product)


def sweep_tiles(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, product: float) -> None:
    """Other tiles for `attend` and `column_sums`."""
    scale = DIM**-0.5
    kept = dict(prefill.CONFIG)
    for m, n, warps, stages in itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4)):
        if m * n < 4096 or m * n > 128 * 128 or (warps == 4 and m * n > 64 * 128):
            continue
        prefill.CONFIG["column_sums", False] = (m, n, warps, stages)
        line(f"column_sums {m, n, warps, stages}", lambda: prefill.column_sums(q, k, lse, None, scale, None), product)
    for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        if warps == 4 and m * n > 64 * 128:
            continue
        prefill.CONFIG["attend", False] = (m, n, warps, stages)
        line(f"attend {m, n, warps, stages}", lambda: prefill.attend(q, k, v, None, scale, None), 2 * product)
    prefill.CONFIG.update(kept)


def references(length: int, count: int, fitted: int, sweep: bool) -> None:
    """What queries behind `length` slots see of them: what they attend to, and what some of them get."""
    q, k, v = tensors(length, 0)
    q, scale, product = q[:, :, -count:], DIM**-0.5, 2 * HEADS * count * length * DIM
    print(f"{count} queries behind {length} slots")
    line("cuDNN with log-sum-exp", lambda: fused(q, k, v, "cudnn", causal=False), 2 * product)
    line("log_sum_exp", lambda: prefill.log_sum_exp(q, k, None, scale, None, length), product)
    lse = prefill.log_sum_exp(q, k, None, scale, None, length)
    line("column_sums, squares", lambda: prefill.column_sums(q, k, lse, None, scale, None, 0, length, 2), product)
    few, part = q[:, :, -fitted:], product * fitted // count
    line(f"cuDNN, {fitted} queries", lambda: fused(few, k, v, "cudnn", causal=False), 2 * part)
    line(f"attend, {fitted} queries", lambda: prefill.attend(few, k, v, None, scale, None, length), 2 * part)
    asked, left = few.unflatten(1, (KV_HEADS, -1)), k[:, :, ::4]
    normal = lse[:, :, -fitted:].unflatten(1, (KV_HEADS, -1))
    line("shares at a quarter", lambda: prefill.shares(asked, left, normal, None, scale, None), part / 4)
    if sweep:
        kept = dict(prefill.CONFIG)
        for m, n, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3)):
            prefill.CONFIG["log_sum_exp", False] = (m, n, warps, stages)
            name = f"log_sum_exp {m, n, warps, stages}"
            line(name, lambda: prefill.log_sum_exp(q, k, None, scale, None, length), product)
        prefill.CONFIG.update(kept)


def closed_form(length: int, window: int) -> None:
    """KVSlimmer's shares of every other pair of `length` slots, from `window` queries."""
    q, k, v = tensors(length, 0)
    q = q[:, :, -window:]
    out, lse = prefill.attend(q, k, v, None, DIM**-0.5, None)
    places = torch.arange(length, device="cuda", dtype=torch.int32).expand(1, KV_HEADS, -1).contiguous()
    chosen = (places[:, :1, 1:] % 2).bool()
    order = partition(torch.nn.functional.pad(chosen, (0, 1)))[0]
    choice = Choice(chosen, order, length // 2 - 1, length // 2 - 1)
    view = View(q, k, v, None, out, lse, DIM**-0.5, None, k, length - window)
    mass = torch.rand(1, KV_HEADS, length, device="cuda")
    product = 2 * HEADS * window * length * DIM
    print(f"closed form of {length // 2 - 1} pairs from {window} queries")
    line("shares of pairs", lambda: pairs.shares(view, places, places[:, 0, -window:], mass, choice), 2 * product)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--length", type=int, nargs="*", default=[4096, 16384, 32768])
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    for length in args.length:
        prefill_kernels(length, 0, args.sweep and length == max(args.length))
    prefill_kernels(512, 2080, False)
    prefill_kernels(16384, 32768, False)
    references(32768, 2048, 64, args.sweep)
    closed_form(32768, 512)


if __name__ == "__main__":
    main()
