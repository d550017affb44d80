"""Tokens per second of streaming perplexity, beside the plain loop: one window, one forward a token.

Run from the repository's root: ``python -m benchmarks.perplexity --weights random``.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvrepro
from kvrepro.adapter import cache_arguments
from kvrepro.decode import Decoder


def main() -> None:
    """Measure, print one line a way."""
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = kvrepro.load_model(args.model, device=args.device, dtype=args.dtype, weights=args.weights)
    length = args.window + (args.windows - 1) * args.stride
    text = random_text(model, length) if args.weights == "random" else real_text(tokenizer, length)
    settings = {"method": args.method, "budget": args.budget}
    print(f"{args.model} ({args.weights}) on {model.device}, {model.dtype}, {torch.get_num_threads()} threads")
    print(f"{args.method}, budget {args.budget}, window {args.window}, stride {args.stride}, {args.windows} windows")
    plain = plain_loop(model, text[: args.window].to(model.device), args.plain_steps, **settings)
    print(f"plain loop          {plain:10.1f} tokens/s")
    for name in range(args.repeats):
        start = time.perf_counter()
        found = kvrepro.perplexity(
            model, text, window=args.window, stride=args.stride, batch_size=args.batch, **settings
        )
        rate = args.windows * (args.window - 1) / (time.perf_counter() - start)
        print(f"kvrepro.perplexity  {rate:10.1f} tokens/s, {rate / plain:5.1f} x, run {name}, ppl {found.ppl:.3f}")
    print("its steps are taken", *sorted(set(modes(model, text[: args.window], **settings))))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="pretrained", choices=["random", "pretrained"])
    parser.add_argument("--device", default=None, help="cpu or cuda; cuda where there is one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--method", default="weightedkv")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=None, help="windows side by side; the package's default")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves PyTorch's number")
    parser.add_argument("--plain-steps", type=int, default=64, help="timed steps of the plain loop")
    parser.add_argument("--repeats", type=int, default=2)
    return parser.parse_args()


def random_text(model: PreTrainedModel, length: int) -> Tensor:
    """`[length]` random token ids."""
    size = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(1, size, (length,), generator=torch.Generator().manual_seed(0))


def real_text(tokenizer: object, length: int) -> Tensor:
    """`[length]` tokens of essays."""
    from kvrepro import texts

    return texts.tokens(texts.load("essays"), tokenizer, length, 1)[0]


@torch.no_grad()
def plain_loop(model: PreTrainedModel, window: Tensor, steps: int, method: str, budget: int) -> float:
    """Tokens a second of one forward a token, once the cache is full."""
    cache = kvrepro.make_cache(model, method, budget)
    steps = min(steps, len(window) - budget - 4)
    kvrepro.prefill(model, window[None, :budget], cache)
    for t in range(budget, budget + 3):
        model(window[None, t : t + 1], **cache_arguments(model, cache))
    wait(model)
    start = time.perf_counter()
    for t in range(budget + 3, budget + 3 + steps):
        model(window[None, t : t + 1], **cache_arguments(model, cache))
    wait(model)
    return steps / (time.perf_counter() - start)


def modes(model: PreTrainedModel, window: Tensor, method: str, budget: int) -> list[str]:
    """How the layers of a full cache are stepped."""
    cache = kvrepro.make_cache(model, method, budget)
    kvrepro.prefill(model, window[None].to(model.device), cache)
    with Decoder(model, cache, room=1) as decoder:
        return decoder.modes


def wait(model: PreTrainedModel) -> None:
    """Until the device has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
