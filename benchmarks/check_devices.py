"""Whether a model on the second of two GPUs, or spread over both, writes what it writes on the first.

Run from the repository's root on a machine with two GPUs: ``python -m benchmarks.check_devices``. It prints a line for
each method and place. The model has the shape of Llama-2-13B and random weights; accelerate puts layers and rotary
embedding where they go, as ``device_map="auto"`` does. It runs in float32 (52 GB of weights), so that a token is not
chosen by rounding. ``model.generate``, given a prompt that was read but for its last token, compresses at other points
than ``kvrepro.generate`` does, so each is compared with itself on the first GPU.
"""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any

import torch
from transformers import PreTrainedModel

import kvrepro

LENGTH, NEW, BUDGET = 1024, 32, 512
CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("streaming_llm", {}),
    ("h2o", {}),
    ("d2o", {"layer_budgets": "variance"}),
    ("weightedkv", {}),
    ("kvmerger", {}),
    ("kvslimmer", {}),
    ("asymkv", {"fisher": "forward"}),  # its loss's gradient differs from run to run, on one GPU too
]


def main(shape: str = "llama-2-13b") -> int:
    """Check all, print one line each; returns the number of failures."""
    if torch.cuda.device_count() < 2:
        print("this check needs two GPUs")
        return 1
    model, _ = kvrepro.load_model(shape, weights="random", device="cuda:0", dtype=torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to("cuda:0")
    first = [written(model, ids, *case) for case in CASES]
    failed = compared(model.to("cuda:1"), ids, first)
    spread(model)
    failed += compared(model, ids, first)
    print(f"{failed} failed")
    return failed


def compared(model: PreTrainedModel, ids: torch.Tensor, first: list[tuple[list[int], ...] | str]) -> int:
    """Print whether the model, where it lies now, writes what it wrote on the first GPU; returns how often it does not.

    What went wrong on the first GPU fails here too: errors are no tokens.
    """
    places = sorted({str(weight.device) for weight in model.parameters()})
    print(f"weights on {', '.join(places)}; the current device is cuda:{torch.cuda.current_device()}")
    failed = 0
    for (name, options), expected in zip(CASES, first, strict=True):
        start = time.perf_counter()
        found = written(model, ids, name, options)
        ok = found == expected and not isinstance(found, str)
        said = "ok" if ok else f"FAILED {found} where the first GPU has {expected}"
        failed += not ok
        print(f"{name} {options}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)
    return failed


def spread(model: PreTrainedModel) -> None:
    """Spread the model over both GPUs."""
    from accelerate import dispatch_model, infer_auto_device_map

    half = sum(p.numel() * p.element_size() for p in model.parameters()) * 55 // 100
    apart = infer_auto_device_map(model, {0: half, 1: 2 * half}, no_split_module_classes=model._no_split_modules)
    dispatch_model(model, apart, skip_keys=model._skip_keys_device_placement)


def written(
    model: PreTrainedModel, ids: torch.Tensor, name: str, options: dict[str, Any]
) -> tuple[list[int], ...] | str:
    """The tokens that `model.generate` and the package's own `generate` write, or what stopped them."""
    ids = ids.to(model.device)
    try:
        tokens = []
        for own in (False, True):
            cache = kvrepro.make_cache(model, name, None if name == "full" else BUDGET, **options)
            if own:
                out = kvrepro.generate(model, ids, cache, NEW, chunk=256)
            else:
                kvrepro.prefill(model, ids[:, :-1], cache, chunk=256)
                out = model.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
            tokens.append(out[0, LENGTH:].tolist())
        return tuple(tokens)
    except Exception:  # the next case is worth trying
        return "error: " + traceback.format_exc(limit=-3)


if __name__ == "__main__":
    sys.exit(main())
