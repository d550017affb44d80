"""Whether decoding on a GPU, graph and kernels, writes what plain generate writes; for every method, a line each.

Run from the repository's root on a machine with a GPU: ``python -m benchmarks.check_decode``.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvrepro
from kvrepro import decode

VOCABULARY, LENGTH, NEW, BUDGET = 512, 96, 40, 48
#: Every method, and the options that change how its steps are taken.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("streaming_llm", {}),
    ("streaming_llm", {"recent": 20}),
    ("streaming_llm", {"positions": "cardinality"}),
    ("h2o", {}),
    ("tova", {}),
    ("snapkv", {}),
    ("pyramidkv", {}),
    ("keydiff", {}),
    ("random", {}),
    ("cam", {}),
    ("d2o", {}),
    ("d2o", {"layer_budgets": "variance"}),
    ("keepkv", {}),
    ("asymkv", {"fisher": "forward"}),
    ("weightedkv", {}),
    ("weightedkv", {"positions": "cardinality"}),
    ("kvmerger", {"block": 4}),
    ("kvmerger", {"block": 4, "mass": "attention", "reduce": "max"}),
    ("kvmerger", {"block": 4, "positions": "cardinality", "pivot": "random"}),
    ("kvmerger", {"block": 4, "skip_layers": True}),
    ("kvmerger", {"block": 4, "budget_mode": "threshold", "epsilon": 0.2}),
    ("kvslimmer", {}),
    ("kvslimmer", {"variant": "released"}),
    ("attention_matching", {"block": 4}),
    ("attention_matching", {"block": 4, "heads": "same"}),
    ("attention_matching", {"block": 4, "keys": "greedy"}),
]


def main() -> int:
    """Check all, print one line each; returns the number of failures."""
    if not torch.cuda.is_available():
        print("this check needs a GPU")
        return 1
    warnings.simplefilter("ignore")
    model, deeper = tiny(torch.device("cuda")), tiny(torch.device("cuda"), layers=5)
    failed = 0
    for name, options in CASES:
        for prompt in (LENGTH, BUDGET - 10):
            start = time.perf_counter()
            try:
                said = check_tokens(deeper if "skip_layers" in options else model, name, options, prompt)
            except Exception:  # the next case is worth trying
                said = "FAILED " + traceback.format_exc(limit=-3)
            failed += not said.startswith("ok")
            print(f"{name} {options} prompt {prompt}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)
    for name in ("full", "streaming_llm", "h2o", "cam", "weightedkv", "tova", "kvmerger"):
        try:
            said = check_perplexity(model, name)
        except Exception:
            said = "FAILED " + traceback.format_exc(limit=-3)
        failed += not said.startswith("ok")
        print(f"perplexity {name}: {said}", flush=True)
    print(f"{failed} failed")
    return failed


def tiny(device: torch.device, layers: int = 3) -> PreTrainedModel:
    """A small Llama with random weights and heads of 64, which the kernels take; attention is far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().to(device)
    model.generation_config.pad_token_id = 0
    return kvrepro.prepare(model)


def check_tokens(model: PreTrainedModel, name: str, options: dict[str, Any], prompt: int) -> str:
    """The two ways' tokens for two rows, one of them padded on the left; how the layers were stepped."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (2, prompt), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, : prompt // 4] = 0
    found = {}

    class Watched(decode.Decoder):
        """A decoder that says how its layers ended up."""

        def __exit__(self, *error: Any) -> None:
            found.update(modes=self.modes, replayed=self.replayed, due=self.replayed_due)
            super().__exit__(*error)

    original, decode.Decoder = decode.Decoder, Watched
    try:
        cache = kvrepro.make_cache(model, name, BUDGET, **options)
        ours = kvrepro.generate(model, ids, cache, NEW, attention_mask=mask)
    finally:
        decode.Decoder = original
    plain = kvrepro.make_cache(model, name, BUDGET, **options)
    plain.plan(prompt)
    theirs = model.generate(ids, attention_mask=mask, past_key_values=plain, max_new_tokens=NEW, do_sample=False)
    modes = ", ".join(f"{n} x {mode}" for mode, n in Counter(found["modes"]).items())
    how = f"{modes}; {found['replayed']} of {NEW - 1} steps from a graph, {found['due']} of them freed a block of slots"
    if prompt == LENGTH and plain.method.leaves(BUDGET) is not None and not found["due"]:
        return f"NO BLOCK FROM A GRAPH, {how}"
    if torch.equal(ours, theirs):
        return f"ok, {how}"
    first = [
        int((a != b).int().argmax()) - prompt if bool((a != b).any()) else -1 for a, b in zip(ours, theirs, strict=True)
    ]
    return f"MISMATCH, first at new token {first} (-1: none), {how}"


def check_perplexity(model: PreTrainedModel, name: str) -> str:
    """Negative log-likelihoods token by token on the GPU and on the CPU."""
    ids = torch.randint(1, VOCABULARY, (2, 200), generator=torch.Generator().manual_seed(2))
    settings = {"window": 120, "stride": 60}
    ours = kvrepro.perplexity(model, ids, name, BUDGET, **settings).nll
    theirs = kvrepro.perplexity(tiny(torch.device("cpu")), ids, name, BUDGET, **settings).nll
    gap = float((ours - theirs).abs().max())
    return f"{'ok' if gap < 1e-3 else 'MISMATCH'}, largest difference {gap:.1e} nats"


if __name__ == "__main__":
    sys.exit(main())
